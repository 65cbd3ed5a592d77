"""A training step: forward, backward and optimiser with the base frozen, of one FFN and of a whole model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.cli import Setting
from harness.ffn_case import exact_ffn, too_big
from harness.footprint import memory_per_image
from harness.inputs import hidden_states, text_tokens
from harness.measure import Candidate, Truth, held_bytes
from harness.model_case import CHECKED_LAYERS, Model
from harness.operands import Adapter, Weights
from harness.product import NAME, Product
from harness.rooflines import FFNShape, ffn_backward, ffn_forward, training_step
from harness.stack import Stack
from harness.timer import Run
from harness.variants import PLAIN_PYTORCH, Variant, variants, yardstick

__all__ = ["Built", "ModelStep", "ffn_candidates", "model_candidates"]

#: How the outputs are computed, the run, bytes held: of Candidate.build.
Built = tuple[Callable[[], dict[str, Tensor]], Run, int]

#: Changes a language model in place.
Prepare = Callable[[nn.Module], None]

DROPOUT = 0.1  # on the visual activations, as in the paper
_LEARNING_RATE = 1.125e-3


def ffn_candidates(
    setting: Setting, *, sequences: int, text_length: int, visual_tokens: int, recompute: bool
) -> list[Candidate]:
    """The variants of one FFN's training step: gradients of its input and of everything that the adapter trains."""
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    shape = _shape(setting, sequences, text_length, visual_tokens)
    adapter = Adapter(preset, slots=shape.slots, device=device)
    features = adapter.batch(sequences, visual_tokens)
    weights = Weights.random(preset, device=device, dtype=dtype, seed=0)
    x = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype)
    grad = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype, offset=5000)
    learner = copy.deepcopy(adapter)  # steps change it; the checks' own stays as it is
    optimiser = _optimiser(learner)

    def forward(variant: Variant, adapter: Adapter, x: Tensor, dropout: float) -> Tensor:
        """(S, T, d): the text's rows of the output."""
        if variant.form == "text":
            return variant.step(x, weights, None, dropout)
        if variant.form == "prompt":
            rows = torch.cat([adapter.project(features).to(dtype), x], dim=1)
            return variant.step(rows, weights, None, dropout)[:, visual_tokens:]
        bound = variant.bind(weights, variant.share(adapter.parts(features, dtype=dtype)))
        return variant.step(x, weights, bound, dropout)

    def gradients(variant: Variant) -> dict[str, Tensor]:
        """Output and gradients with nothing dropped: for the check."""
        _clear(adapter)
        leaf = x.clone().requires_grad_()
        y = forward(variant, adapter, leaf, 0.0)
        torch.autograd.backward(y, grad)
        assert leaf.grad is not None
        return {"y": y.detach(), "x": leaf.grad, **_adapter_gradients(adapter)}

    @functools.cache
    def plain(name: str) -> dict[str, Tensor]:
        return gradients(variants(device, compiled=False)[name])

    @functools.cache
    def exact(kind: str) -> dict[str, Tensor]:
        wide = copy.deepcopy(adapter).double()
        _clear(wide)
        leaf = x.double().requires_grad_()
        rows = leaf
        if kind == "prompt":
            rows = torch.cat([wide.project(features.double()), leaf], dim=1)
        parts = wide.parts(features.double(), dtype=torch.float64) if kind == "memory" else None
        y = exact_ffn(rows, weights, parts)[:, -text_length:]
        torch.autograd.backward(y, grad.double())
        assert leaf.grad is not None
        return {"y": y.detach(), "x": leaf.grad, **_adapter_gradients(wide)}

    def truth(form: str) -> Truth:
        return Truth(plain(yardstick(form)), exact(form if form in ("text", "prompt") else "memory"))

    def build(variant: Variant) -> Built:
        leaf = x.clone().requires_grad_()

        def step() -> None:
            torch.autograd.backward(forward(variant, learner, leaf, DROPOUT if variant.has_memory else 0.0), grad)
            _update(optimiser)
            leaf.grad = None

        held = held_bytes(weights, x, grad) + _trained_bytes(adapter)
        return functools.partial(gradients, variant), Run([step], graph=False), held

    return [
        Candidate(
            name=variant.name,
            build=functools.partial(build, variant),
            truth=functools.partial(truth, variant.form),
            count=ffn_forward(variant.form, shape, training=True) + ffn_backward(variant.form, shape),
            missing=variant.missing(device) or _too_big(variant, setting, shape, layers=1),
            memory_per_image=memory_per_image(
                variant.form, preset, slots=shape.slots, layers=1, element=setting.element
            ),
        )
        for variant in _trainable(setting, recompute)
    ]


class ModelStep:
    """A whole model's training step: cross entropy of the text, gradients of the adapter, AdamW.

    Args:
        setting: device, dtype, preset.
        model: weights.
        sequences, text_length: S and T; every sequence has its own image.
        visual_tokens: tokens of an image.
        recompute, checkpointing: what is formed again in the backward.
    """

    def __init__(
        self,
        setting: Setting,
        model: Model,
        *,
        sequences: int,
        text_length: int,
        visual_tokens: int,
        recompute: bool,
        checkpointing: bool,
    ) -> None:
        device, preset = setting.device, setting.preset
        self.setting, self.model = setting, model
        self.recompute, self.checkpointing = recompute, checkpointing
        self.shape = _shape(setting, sequences, text_length, visual_tokens)
        self.adapter = Adapter(preset, slots=self.shape.slots, device=device)
        self.features = self.adapter.batch(sequences, visual_tokens)
        self.tokens = text_tokens(sequences, text_length, preset.vocabulary, device=device)

    def loss(
        self, variant: Variant, stack: Stack, adapter: Adapter, dtype: torch.dtype, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """The loss and the logits of a variant."""
        stack.checkpointing = self.checkpointing
        features = self.features.to(adapter.fc1_weight.dtype)
        visual = adapter.project(features).to(dtype) if variant.form == "prompt" else None
        shared = variant.share(adapter.parts(features, dtype=dtype)) if variant.has_memory else None
        stack.use(variant, shared=shared, dropout=dropout)
        x = stack.embed(self.tokens, visual)
        if variant.form == "text":
            # Nothing is trained, but the backward passes through every layer all the same.
            x = x.detach().requires_grad_()
        return stack.loss(x, self.tokens)

    def gradients(self, variant: Variant, stack: Stack, adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits and gradients with nothing dropped: for the check."""
        _clear(adapter)
        value, logits = self.loss(variant, stack, adapter, dtype, 0.0)
        torch.autograd.backward(value)
        # The logits rather than the loss: a single number can be right by luck, and then nobody reaches twice its error.
        return {"logits": logits.detach(), **_adapter_gradients(adapter)}

    def product(self, stack: Stack, prepare: Prepare | None = None) -> Product:
        """MemVPModel on the stack's weights; `prepare` changes the language model beforehand."""
        return Product(stack, self.adapter, recompute=self.recompute, checkpointing=self.checkpointing, prepare=prepare)

    def build_product(self, prepare: Prepare | None = None) -> Built:
        """A step of MemVPModel."""

        def outputs() -> dict[str, Tensor]:
            checked = self.product(self.model.head, prepare)
            value, logits = checked.loss(self.tokens, self.features, dropout=False)
            torch.autograd.backward(value)
            return {"logits": logits.detach(), **checked.gradients()}

        product = self.product(self.model.stack, prepare)
        optimiser = _optimiser(product.model.memory)

        def step() -> None:
            torch.autograd.backward(product.loss(self.tokens, self.features, dropout=True)[0])
            _update(optimiser)

        return outputs, Run([step], graph=False), product.bytes + _trained_bytes(self.adapter)


def model_candidates(
    setting: Setting,
    model: Model,
    *,
    sequences: int,
    text_length: int,
    visual_tokens: int,
    recompute: bool,
    checkpointing: bool,
) -> list[Candidate]:
    """The variants of a whole model's training step; the arguments are ModelStep's."""
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    step = ModelStep(
        setting,
        model,
        sequences=sequences,
        text_length=text_length,
        visual_tokens=visual_tokens,
        recompute=recompute,
        checkpointing=checkpointing,
    )
    shape, adapter = step.shape, step.adapter
    learner = copy.deepcopy(adapter)  # steps change it; the checks' own stays as it is
    optimiser = _optimiser(learner)

    @functools.cache
    def plain(name: str) -> dict[str, Tensor]:
        return step.gradients(variants(device, compiled=False)[name], model.head, adapter, dtype)

    @functools.cache
    def exact(name: str) -> dict[str, Tensor]:
        variant = variants(device, compiled=False)[name]
        return step.gradients(variant, model.exact, copy.deepcopy(adapter).double(), torch.float64)

    def truth(form: str) -> Truth:
        return Truth(plain(yardstick(form)), exact(form if form in ("text", "prompt") else PLAIN_PYTORCH))

    def build(variant: Variant) -> Built:
        def run() -> None:
            dropout = DROPOUT if variant.has_memory else 0.0
            torch.autograd.backward(step.loss(variant, model.stack, learner, dtype, dropout)[0])
            _update(optimiser)

        outputs = functools.partial(step.gradients, variant, model.head, adapter, dtype)
        return outputs, Run([run], graph=False), model.stack.bytes + _trained_bytes(adapter)

    size = {"preset": preset, "shape": shape, "layers": setting.layers}
    note = f"checked on {CHECKED_LAYERS} of {setting.layers} layers" if setting.layers > CHECKED_LAYERS else ""
    memory = functools.partial(
        memory_per_image, preset=preset, slots=shape.slots, layers=setting.layers, element=setting.element
    )
    found = [
        Candidate(
            name=variant.name,
            build=functools.partial(build, variant),
            truth=functools.partial(truth, variant.form),
            count=training_step(variant.form, **size, checkpointing=checkpointing),  # type: ignore[arg-type]
            missing=variant.missing(device) or _too_big(variant, setting, shape, layers=setting.layers),
            memory_per_image=memory(variant.form),
            note=note,
        )
        for variant in _trainable(setting, recompute)
    ]
    if setting.wants(NAME):
        found.append(
            Candidate(
                name=NAME,
                build=step.build_product,
                truth=functools.partial(truth, "factored"),
                count=training_step("factored", **size, checkpointing=checkpointing),  # type: ignore[arg-type]
                memory_per_image=memory("factored"),
                note="with all of transformers' forward around it",
            )
        )
    return found


def _trainable(setting: Setting, recompute: bool) -> list[Variant]:
    found = variants(setting.device, compiled=setting.compiled, recompute=recompute).values()
    return [variant for variant in found if variant.training and setting.wants(variant.name)]


def _shape(setting: Setting, sequences: int, text_length: int, visual_tokens: int) -> FFNShape:
    size: dict[str, Any] = {"sequences": sequences, "tokens": text_length, "visual_tokens": visual_tokens}
    return FFNShape.of(setting.preset, **size, element=setting.element)


def _too_big(variant: Variant, setting: Setting, shape: FFNShape, *, layers: int) -> str | None:
    """Concatenated weights are kept for the backward in every layer, and get gradients of their size."""
    if variant.form != "concatenated":
        return None
    return too_big(
        2 * shape.sequences * layers * 2 * (shape.pairs + shape.slots) * shape.width * setting.element, setting.device
    )


def _optimiser(adapter: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.02)


def _update(optimiser: torch.optim.Optimizer) -> None:
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def _clear(adapter: Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.grad = None


def _adapter_gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Gradients of what the adapter trains; a text-only step gives none."""
    return {name: p.grad.detach().clone() for name, p in adapter.named_parameters() if p.grad is not None}


def _trained_bytes(adapter: Adapter) -> int:
    """Parameters and AdamW's two moments; the gradients appear within the step."""
    return 3 * held_bytes(list(adapter.parameters()))
