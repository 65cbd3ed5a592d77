"""The operator as autograd calls it, forward that keeps and backward, against the bare matrix products it cannot do without."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from harness.cli import Setting
from harness.ffn_case import exact_ffn, too_big
from harness.inputs import hidden_states
from harness.measure import Candidate, Truth, held_bytes
from harness.operands import Adapter, Parts, Weights
from harness.rooflines import Count, FFNShape, ffn_backward, ffn_forward
from harness.timer import Run
from harness.variants import Variant, variants, yardstick

__all__ = ["backward_candidates", "forward_candidates"]

Leaves = dict[str, Tensor]
#: How the outputs are computed, the run, bytes held: of Candidate.build.
Built = tuple[Callable[[], dict[str, Tensor]], Run, int]


class _Problem:
    """Operands of one training FFN, every one that a variant differentiates being a leaf."""

    def __init__(self, setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> None:
        device, dtype, preset = setting.device, setting.dtype, setting.preset
        self.setting = setting
        self.shape = FFNShape.of(
            preset, sequences=sequences, tokens=text_length, visual_tokens=visual_tokens, element=setting.element
        )
        adapter = Adapter(preset, slots=self.shape.slots, device=device)
        self.parts = adapter.parts(adapter.batch(sequences, visual_tokens), dtype=dtype).map(Tensor.detach)
        self.weights = Weights.random(preset, device=device, dtype=dtype, seed=0)
        self.x = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype)
        self.grad = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype, offset=5000)
        # Kept here rather than by functools.cache, which would keep every problem alive, on the GPU, to the end of the run.
        self._exact: dict[bool, dict[str, Tensor]] = {}
        self._plain: dict[str, dict[str, Tensor]] = {}

    def leaves(self, variant: Variant) -> tuple[Tensor, Parts, Leaves]:
        """x and the memory as leaves, and those of them that the variant's form trains."""
        x = self.x.clone().requires_grad_()
        parts = self.parts.map(lambda t: t.clone().requires_grad_())
        if not variant.has_memory:
            return x, parts, {"x": x}
        return x, parts, {"x": x, **_named(parts)}

    def forward(self, variant: Variant, x: Tensor, bound: object) -> Tensor:
        return variant.step(x, self.weights, bound, 0.0)

    def exact(self, memory: bool) -> dict[str, Tensor]:
        """Output and gradients in float64; made once."""
        if memory not in self._exact:
            x = self.x.double().requires_grad_()
            parts = self.parts.map(lambda t: t.double().requires_grad_())
            y = exact_ffn(x, self.weights, parts if memory else None)
            leaves = {"x": x, **_named(parts)} if memory else {"x": x}
            self._exact[memory] = {"y": y.detach(), **_gradients(y, leaves, self.grad.double())}
        return self._exact[memory]

    def plain(self, name: str) -> dict[str, Tensor]:
        """The same of a variant of plain PyTorch; made once."""
        if name not in self._plain:
            self._plain[name] = self.outputs(variants(self.setting.device, compiled=False)[name])
        return self._plain[name]

    def outputs(self, variant: Variant) -> dict[str, Tensor]:
        """Output and gradients of a variant, memory formed or bound within."""
        x, parts, leaves = self.leaves(variant)
        y = self.forward(variant, x, variant.bind(self.weights, variant.share(parts)) if variant.has_memory else None)
        return {"y": y.detach(), **_gradients(y, leaves, self.grad)}

    def truth(self, variant: Variant) -> Truth:
        return Truth(self.plain(yardstick(variant.form)), self.exact(variant.has_memory))

    def bound_leaves(self, variant: Variant) -> tuple[Tensor, object, list[Tensor]]:
        """x, what the variant reads, and the leaves that its backward differentiates: no work of the projector is timed."""
        x = self.x.clone().requires_grad_()
        if not variant.has_memory:
            return x, None, [x]
        shared = variant.share(self.parts)
        tensors = _leaf_tensors(shared)
        for tensor in tensors:
            tensor.requires_grad_()
        return x, variant.bind(self.weights, shared), [x, *tensors]


def forward_candidates(setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> list[Candidate]:
    """The forward that keeps what the backward needs."""
    problem = _Problem(setting, sequences=sequences, text_length=text_length, visual_tokens=visual_tokens)

    def build(variant: Variant) -> Built:
        x, bound, _ = problem.bound_leaves(variant)
        call = functools.partial(problem.forward, variant, x, bound)
        run = Run([call], graph=False)
        return lambda: {"y": problem.outputs(variant)["y"]}, run, held_bytes(problem.weights, x, bound)

    return _candidates(
        problem, build, lambda form: ffn_forward(form, problem.shape, training=True), ["y"], _forward_products
    )


def backward_candidates(setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> list[Candidate]:
    """The backward alone, weights frozen."""
    problem = _Problem(setting, sequences=sequences, text_length=text_length, visual_tokens=visual_tokens)

    def build(variant: Variant) -> Built:
        x, bound, leaves = problem.bound_leaves(variant)
        y = problem.forward(variant, x, bound)

        def call() -> object:
            return torch.autograd.grad(y, leaves, problem.grad, retain_graph=True)

        held = held_bytes(problem.weights, x, bound, problem.grad)
        return functools.partial(problem.outputs, variant), Run([call], graph=False), held

    return _candidates(problem, build, lambda form: ffn_backward(form, problem.shape), None, _backward_products)


def _candidates(
    problem: _Problem,
    build: Callable[[Variant], Built],
    count: Callable[[str], Count],
    names: list[str] | None,
    products: Callable[[_Problem], tuple[dict[str, Tensor], Run, int]],
) -> list[Candidate]:
    setting, shape = problem.setting, problem.shape

    def truth(variant: Variant) -> Truth:
        found = problem.truth(variant)
        if names is None:
            return found
        return Truth({n: found.plain[n] for n in names}, {n: found.exact[n] for n in names})

    def itself() -> Truth:
        outputs = products(problem)[0]
        return Truth(outputs, {name: t.double() for name, t in outputs.items()})

    found = [
        Candidate(
            name="matmul",
            build=functools.partial(products, problem),
            truth=itself,
            count=count("text"),
            note="the matrix products alone (torch.mm): no activation, no memory; its error is not judged",
        )
    ]
    for variant in variants(setting.device, compiled=setting.compiled).values():
        if variant.form == "prompt" or not variant.training or not setting.wants(variant.name):
            continue
        size = shape.sequences * 2 * (shape.pairs + shape.slots) * shape.width * setting.element
        found.append(
            Candidate(
                name=variant.name,
                build=functools.partial(build, variant),
                truth=functools.partial(truth, variant),
                count=count(variant.form),
                missing=variant.missing(setting.device)
                or (too_big(3 * size, setting.device) if variant.form == "concatenated" else None),
            )
        )
    return found


def _forward_products(problem: _Problem) -> tuple[dict[str, Tensor], Run, int]:
    x, w = problem.x.flatten(0, 1), problem.weights
    hidden = torch.empty(x.shape[0], w.key.shape[0], dtype=x.dtype, device=x.device)
    y = torch.empty_like(x)

    def call() -> Tensor:
        torch.mm(x, w.gate.T, out=hidden)
        torch.mm(x, w.key.T, out=hidden)
        return torch.mm(hidden, w.value, out=y)

    return {"y": call().clone()}, Run([call], graph=False), held_bytes(w, x)


def _backward_products(problem: _Problem) -> tuple[dict[str, Tensor], Run, int]:
    grad, w = problem.grad.flatten(0, 1), problem.weights
    hidden = torch.empty(grad.shape[0], w.key.shape[0], dtype=grad.dtype, device=grad.device)
    dx = torch.empty_like(grad)

    def call() -> Tensor:
        torch.mm(grad, w.value.T, out=hidden)
        torch.mm(hidden, w.gate, out=dx)
        return dx.addmm_(hidden, w.key)

    return {"x": call().clone()}, Run([call], graph=False), held_bytes(w, grad)


def _named(parts: Parts) -> Leaves:
    return dict(zip(("core", "basis", "key_position", "value_position"), parts.tensors, strict=True))


def _gradients(y: Tensor, leaves: Leaves, grad: Tensor) -> Leaves:
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


def _leaf_tensors(shared: object) -> list[Tensor]:
    """The tensors of what a variant shares among layers; of a formed memory the two matrices."""
    return [value for value in vars(shared).values() if isinstance(value, Tensor)]
