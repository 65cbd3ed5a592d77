"""Every way to put an image into an FFN that the benchmarks compare: ours, the paper's, plain PyTorch's, Liger's."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Outputs, Truth
from torch import Tensor
from workload import Factors, Weights

from memvp_kernels import fused_ffn, reference
from memvp_kernels.dispatch import missing as missing_backend

#: Plain PyTorch's own way to compute each form: twice its error is allowed.
PLAIN_PYTORCH = "plain-eager"
_PYTORCH = {"text": "text", "prompt": "prompt", "factored": "factored-eager"}

Step = Callable[[Tensor, Weights, Any, float], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute the FFN of a model that has seen an image.

    Attributes:
        name: in rows and on the command line.
        form: of roofline.FORMS: what it has to compute and to read.
        step: (x, weights, bound, dropout) → y; the call that is timed, once per layer.
        share: factors → what all layers of a model share; once per step in training, once per image in inference.
        bind: (weights, shared) → what one layer keeps; in training part of every step, in inference done beforehand.
        missing: device → why this machine can't have it, or None.
    """

    name: str
    form: str
    step: Step
    share: Callable[[Factors], Any] = lambda factors: None
    bind: Callable[[Weights, Any], Any] = lambda weights, shared: shared
    missing: Callable[[torch.device], str | None] = lambda device: None

    @property
    def has_memory(self) -> bool:
        """Whether the image enters through the FFN's memory."""
        return self.form not in ("text", "prompt")


def ffn(x: Tensor, weights: Weights, _bound: Any = None, _dropout: float = 0.0) -> Tensor:
    """What transformers' LlamaMLP computes."""
    return F.linear(F.silu(F.linear(x, weights.gate)) * F.linear(x, weights.key), weights.value.T)


@dataclass(frozen=True)
class Materialized:
    """K and V of the memory, (S, M, d) each."""

    key: Tensor
    value: Tensor
    scale: float


def materialize(factors: Factors) -> Materialized:
    f = factors.features
    return Materialized(f + factors.key_position, f + factors.value_position, factors.scale)


def _branch(x: Tensor, memory: Materialized, dropout: float) -> Tensor:
    """The official code's branch: s · dropout(silu(x Kᵀ)) V."""
    visual = F.dropout(F.silu(x @ memory.key.transpose(1, 2)), dropout, training=dropout > 0)
    return memory.scale * (visual @ memory.value)


def _plain_eager(x: Tensor, weights: Weights, bound: Materialized, dropout: float) -> Tensor:
    """The two branches in plain PyTorch, K and V materialized beforehand: the best eager form."""
    return ffn(x, weights) + _branch(x, bound, dropout)


@dataclass(frozen=True)
class Official:
    """f of the batch and the positions; K and V are built from them in every layer."""

    features: Tensor
    key_position: Tensor
    value_position: Tensor
    scale: float


def _official(factors: Factors) -> Official:
    return Official(factors.features, factors.key_position, factors.value_position, factors.scale)


def _official_eager(x: Tensor, weights: Weights, bound: Official, dropout: float) -> Tensor:
    """As the paper's code has it: K and V built anew in every layer and step."""
    memory = Materialized(bound.features + bound.key_position, bound.features + bound.value_position, bound.scale)
    return ffn(x, weights) + _branch(x, memory, dropout)


def _concatenate(weights: Weights, shared: Materialized) -> Materialized:
    """[K; Kv] and [V; s·Vv] of every sequence, (S, F + M, d) each: the copies that this package avoids."""
    s = shared.key.shape[0]
    key = torch.cat([weights.key.expand(s, -1, -1), shared.key], dim=1)
    value = torch.cat([weights.value.expand(s, -1, -1), shared.scale * shared.value], dim=1)
    return Materialized(key, value, 1.0)


def _concatenated(x: Tensor, weights: Weights, bound: Materialized, dropout: float) -> Tensor:
    """One product with [K; Kv], one with [V; Vv], as the paper's equation reads; the memory's share is not gated."""
    f = weights.key.shape[0]
    scores = x @ bound.key.transpose(1, 2)
    hidden = F.silu(F.linear(x, weights.gate)) * scores[..., :f]
    visual = F.dropout(F.silu(scores[..., f:]), dropout, training=dropout > 0)
    return torch.cat([hidden, visual], dim=-1) @ bound.value


def _factored_eager(x: Tensor, weights: Weights, bound: Factors, dropout: float) -> Tensor:
    """The factored memory in a handful of plain PyTorch ops, without this package: is the arithmetic alone enough?"""
    r = bound.basis.shape[0]
    columns = F.linear(x, torch.cat([bound.basis, bound.key_position]))
    scores = torch.baddbmm(columns[..., r:], columns[..., :r], bound.core.transpose(1, 2))
    visual = bound.scale * F.dropout(F.silu(scores), dropout, training=dropout > 0)
    wide = torch.cat([bound.basis, bound.value_position])
    return ffn(x, weights) + torch.cat([visual @ bound.core, visual], -1) @ wide


def _liger(x: Tensor, weights: Weights, bound: Materialized, dropout: float) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    hidden = LigerSiLUMulFunction.apply(F.linear(x, weights.gate), F.linear(x, weights.key))
    return F.linear(hidden, weights.value.T) + _branch(x, bound, dropout)


def _missing_liger(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "Liger's kernels need a GPU"
    return "liger-kernel is not installed" if importlib.util.find_spec("liger_kernel") is None else None


def _fused(form: str, **options: Any) -> Step:
    """This package's operator on a memory in a form."""

    def memory(bound: Any) -> dict[str, Any]:
        if form == "text":
            return {}
        if form == "plain":
            return {"visual_key": bound.key, "visual_value": bound.value, "visual_scale": bound.scale}
        core = bound.core if form == "factored" else bound.features
        basis = {"visual_basis": bound.basis} if form == "factored" else {}
        positions = {"key_position": bound.key_position, "value_position": bound.value_position}
        return {"visual_key": core, "visual_value": core, "visual_scale": bound.scale, **basis, **positions}

    def step(x: Tensor, weights: Weights, bound: Any, dropout: float) -> Tensor:
        more = memory(bound)
        return fused_ffn(x, weights.key, weights.value, gate=weights.gate, dropout_p=dropout, **more, **options)

    return step


def exact_ffn(x: Tensor, weights: Weights, factors: Factors | None) -> Tensor:
    """The float64 definition of this package."""
    memory: dict[str, Any] = {}
    if factors is not None:
        memory = {
            "visual_key": factors.core,
            "visual_value": factors.core,
            "visual_basis": factors.basis,
            "key_position": factors.key_position,
            "value_position": factors.value_position,
            "visual_scale": factors.scale,
        }
    return reference.ffn(x, weights.key, weights.value, gate=weights.gate, **memory)


def pytorch_of(form: str) -> str:
    """The variant whose error is the measure for all variants of a form."""
    return _PYTORCH.get(form, PLAIN_PYTORCH)


def truths(
    device: torch.device, plain: Callable[[Variant], Outputs], exact: Callable[[Variant], Outputs]
) -> Callable[[str], Truth]:
    """What variants of a form are judged against, each computed once: `plain` of PyTorch's own variant of that form, and `exact`, in
    float64, of the simplest variant that computes the same function."""
    known = variants(device, compiled=False)
    plain_of, exact_of = (functools.cache(lambda name, of=of: of(known[name])) for of in (plain, exact))
    return lambda form: Truth(
        plain_of(pytorch_of(form)), exact_of(form if form in ("text", "prompt") else PLAIN_PYTORCH)
    )


def variants(device: torch.device, *, compiled: bool, recompute: bool = False) -> dict[str, Variant]:
    """All variants by name; `missing` says which of them this machine lacks.

    Args:
        device: on a CPU the GPU backends are left out, and "auto", which is the torch backend there.
        compiled: also the torch.compile forms (tens of seconds each on a CPU).
        recompute: ours compute the pre-activations again in the backward.
    """
    found = [
        Variant("prompt", "prompt", ffn),
        Variant("text", "text", ffn),
        Variant("official-eager", "official", _official_eager, _official),
        Variant(PLAIN_PYTORCH, "plain", _plain_eager, materialize),
        Variant("factored-eager", "factored", _factored_eager, lambda factors: factors),
        Variant("concatenated", "concatenated", _concatenated, materialize, _concatenate),
        Variant("liger", "plain", _liger, materialize, missing=_missing_liger),
    ]
    if compiled:
        compile_ = functools.partial(torch.compile, dynamic=False)
        found += [
            Variant("prompt-compile", "prompt", compile_(ffn)),
            Variant("text-compile", "text", compile_(ffn)),
            Variant("official-compile", "official", compile_(_official_eager), _official),
            Variant("plain-compile", "plain", compile_(_plain_eager), materialize),
        ]
    for backend in ("torch", "triton", "cuda", "auto") if device.type == "cuda" else ("torch",):
        found += _ours(backend, backend, recompute=recompute)
    if device.type == "cuda":
        for implementation in ("fused", "cublas"):
            found += _ours(f"triton-{implementation}", "triton", recompute=recompute, implementation=implementation)
    return {variant.name: variant for variant in found}


def _ours(name: str, backend: str, *, recompute: bool, implementation: str | None = None) -> list[Variant]:
    """The operator with either form of memory, by one backend, and there by one implementation of its large products."""
    options: dict[str, Any] = {"missing": functools.partial(missing_backend, backend)}
    shares = {"plain": materialize, "factored": lambda factors: factors}
    found = []
    for form, share in shares.items():
        step = _fused(form, backend=backend, recompute=recompute)
        step = step if implementation is None else by_implementation(step, implementation)
        found.append(Variant(f"{form}-{name}", form, step, share, **options))
    return found


def by_implementation(step: Step, implementation: str) -> Step:
    """The step with all of the Triton backend's large products by one implementation, forward and backward; else its cost model mixes."""

    def computed(x: Tensor, weights: Weights, bound: Any, dropout: float) -> Tensor:
        from memvp_kernels.backends.triton.gemm import override_implementation

        entered: list[AbstractContextManager[None]] = []

        def enter(_grads: object) -> None:
            entered.append(override_implementation(implementation))
            entered[-1].__enter__()

        def leave(_inputs: object, _outputs: object) -> None:
            entered.pop().__exit__(None, None, None)

        with override_implementation(implementation):
            y = step(x, weights, bound, dropout)
        if y.grad_fn is not None:  # its backward runs later, and again for every timed call
            y.grad_fn.register_prehook(enter)
            y.grad_fn.register_hook(leave)
        return y

    return computed


@dataclass(frozen=True)
class Joined:
    """A factored memory as PyTorch takes it with the fewest launches: what is shared joined, and s folded in, beforehand.

    Attributes:
        key: [W; p^k], (r + M, d).
        value: s·[W; p^v], (r + M, d).
        core: (S, M, r).
    """

    key: Tensor
    value: Tensor
    core: Tensor


def join(factors: Factors) -> Joined:
    """The memory of `factors`, joined."""
    key, value = (torch.cat([factors.basis, position]) for position in (factors.key_position, factors.value_position))
    return Joined(key, factors.scale * value, factors.core)


def factored_joined(x: Tensor, weights: Weights, bound: Joined, _dropout: float) -> Tensor:
    """The best that PyTorch does without this package: products accumulated where an op can."""
    r = bound.core.shape[-1]
    columns = F.linear(x, bound.key)
    visual = F.silu(torch.baddbmm(columns[..., r:], columns[..., :r], bound.core.transpose(1, 2)))
    memory = torch.cat([visual @ bound.core, visual], -1)
    return torch.addmm(ffn(x, weights).flatten(0, 1), memory.flatten(0, 1), bound.value).view_as(x)


def decode_variants(device: torch.device, *, compiled: bool, images: bool) -> dict[str, Variant]:
    """What a decode step is compared with: about images, or of text alone."""
    everything = variants(device, compiled=compiled)
    backends = ("triton", "cuda", "auto") if device.type == "cuda" else ("torch",)
    if not images:
        found = {name: everything[name] for name in ("text", "text-compile") if name in everything}
        for backend in backends:
            name = f"text-{backend}"
            missing = functools.partial(missing_backend, backend)
            found[name] = Variant(name, "text", _fused("text", backend=backend), missing=missing)
        return found
    names = ["text", "official-eager", PLAIN_PYTORCH, "official-compile", "plain-compile"]
    names += [f"factored-{backend}" for backend in backends]
    found = {name: everything[name] for name in names if name in everything}
    found["factored-joined"] = Variant("factored-joined", "factored", factored_joined, join)
    if compiled:
        step = torch.compile(factored_joined, dynamic=False)
        found["factored-compile"] = Variant("factored-compile", "factored", step, join)
    if device.type == "cuda":
        missing = functools.partial(missing_backend, "cuda")
        step = _fused("positions", backend="cuda")
        found["positions-cuda"] = Variant("positions-cuda", "positions", step, _official, missing=missing)
        found |= _decode_forms(found["factored-cuda"]) if missing(device) is None else {}
    return found


def _decode_forms(ours: Variant) -> dict[str, Variant]:
    """The decode kernel in each of its forms; otherwise it goes by the chip."""
    from memvp_kernels.backends.cuda import decode, extension

    def in_form(form: str, *arguments: Any) -> Tensor:
        with decode.override_form(form):
            return ours.step(*arguments)

    forms = [form for form in extension.load().form_codes if form != "auto"]  # type: ignore[union-attr]
    names = [f"{ours.name}-{form.replace(' ', '-')}" for form in forms]
    steps = [functools.partial(in_form, form) for form in forms]
    return {name: dataclasses.replace(ours, name=name, step=step) for name, step in zip(names, steps, strict=True)}
