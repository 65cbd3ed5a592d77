"""Every way to put an image into an FFN that the benchmarks set beside one another: ours, the official one, the peers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cli import BY_NAME, ROADS
from harness.operands import Parts, Weights
from memvp_kernels import fused_ffn
from memvp_kernels.dispatch import missing as missing_backend

__all__ = ["PLAIN_PYTORCH", "Step", "Variant", "missing_road", "variants", "yardstick"]

#: Plain PyTorch's own way to compute each form: the yardstick of its error (twice that is allowed).
_YARDSTICKS = {"text": "text", "prompt": "prompt", "factored": "factored-eager"}
PLAIN_PYTORCH = "formed-eager"

Share = Callable[[Parts], Any]
Bind = Callable[[Weights, Any], Any]
Step = Callable[[Tensor, Weights, Any, float], Tensor]


def _nothing(_parts: Parts) -> None:
    return None


def _as_shared(_weights: Weights, shared: Any) -> Any:
    return shared


@dataclass(frozen=True)
class Variant:
    """One way to compute the FFN of a model that has seen an image.

    Attributes:
        name: in rows and on the command line.
        form: of harness.rooflines.FORMS: what it has to compute and to read.
        step: (x, weights, bound, dropout) → y; the call that is timed, once per layer.
        share: parts → what all layers of a model share; once per step in training, once per image in inference.
        bind: (weights, shared) → what one layer keeps; in training part of every step, in inference done beforehand.
        missing: device → why this machine can't have it, or None.
        training: has a backward.
        rows: the most rows of x that it takes; None: any.
    """

    name: str
    form: str
    step: Step
    share: Share = _nothing
    bind: Bind = _as_shared
    missing: Callable[[torch.device], str | None] = lambda device: None
    training: bool = True
    rows: int | None = None

    @property
    def has_memory(self) -> bool:
        """Whether the image enters through the FFN's memory."""
        return self.form not in ("text", "prompt")


def plain_ffn(x: Tensor, weights: Weights, _bound: Any = None, _dropout: float = 0.0) -> Tensor:
    """What transformers' LlamaMLP computes."""
    return F.linear(F.silu(F.linear(x, weights.gate)) * F.linear(x, weights.key), weights.value.T)


@dataclass(frozen=True)
class Formed:
    """K and V of the memory, (S, M, d) each."""

    key: Tensor
    value: Tensor
    scale: float


def _formed(parts: Parts) -> Formed:
    f = parts.features()
    return Formed(f + parts.key_position, f + parts.value_position, parts.scale)


def _branch(x: Tensor, memory: Formed, dropout: float) -> Tensor:
    """The official code's branch: s · dropout(silu(x Kᵀ)) V."""
    visual = F.dropout(F.silu(x @ memory.key.transpose(1, 2)), dropout, training=dropout > 0)
    return memory.scale * (visual @ memory.value)


def formed_eager(x: Tensor, weights: Weights, bound: Formed, dropout: float) -> Tensor:
    """The two branches in plain PyTorch, K and V formed beforehand: the best eager form."""
    return plain_ffn(x, weights) + _branch(x, bound, dropout)


@dataclass(frozen=True)
class Official:
    """f of the batch and the positions; K and V are formed from them in every layer."""

    features: Tensor
    key_position: Tensor
    value_position: Tensor
    scale: float


def _official(parts: Parts) -> Official:
    return Official(parts.features(), parts.key_position, parts.value_position, parts.scale)


def official_eager(x: Tensor, weights: Weights, bound: Official, dropout: float) -> Tensor:
    """As the paper's code has it: K and V built anew in every layer and step."""
    memory = Formed(bound.features + bound.key_position, bound.features + bound.value_position, bound.scale)
    return plain_ffn(x, weights) + _branch(x, memory, dropout)


@dataclass(frozen=True)
class Concatenated:
    """[K; Kv] and [V; s·Vv] of every sequence, (S, F + M, d) each: the copies that this package avoids."""

    key: Tensor
    value: Tensor


def _concatenated(weights: Weights, shared: Formed) -> Concatenated:
    s = shared.key.shape[0]
    key = torch.cat([weights.key.expand(s, -1, -1), shared.key], dim=1)
    value = torch.cat([weights.value.expand(s, -1, -1), shared.scale * shared.value], dim=1)
    return Concatenated(key, value)


def concatenated(x: Tensor, weights: Weights, bound: Concatenated, dropout: float) -> Tensor:
    """One product with [K; Kv], one with [V; Vv], as the paper's equation reads; the memory's part is not gated."""
    f = weights.key.shape[0]
    scores = x @ bound.key.transpose(1, 2)
    hidden = F.silu(F.linear(x, weights.gate)) * scores[..., :f]
    visual = F.dropout(F.silu(scores[..., f:]), dropout, training=dropout > 0)
    return torch.cat([hidden, visual], dim=-1) @ bound.value


def factored_eager(x: Tensor, weights: Weights, bound: Parts, dropout: float) -> Tensor:
    """The factored memory in a handful of plain PyTorch ops, without this package: is the arithmetic alone enough?"""
    r = bound.basis.shape[0]
    columns = F.linear(x, torch.cat([bound.basis, bound.key_position]))
    scores = torch.baddbmm(columns[..., r:], columns[..., :r], bound.core.transpose(1, 2))
    visual = bound.scale * F.dropout(F.silu(scores), dropout, training=dropout > 0)
    return plain_ffn(x, weights) + torch.cat([visual @ bound.core, visual], -1) @ torch.cat(
        [bound.basis, bound.value_position]
    )


def _liger(x: Tensor, weights: Weights, bound: Formed, dropout: float) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    hidden = LigerSiLUMulFunction.apply(F.linear(x, weights.gate), F.linear(x, weights.key))
    return F.linear(hidden, weights.value.T) + _branch(x, bound, dropout)


def _missing_liger(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "Liger's kernels need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def _ours_plain(backend: str, recompute: bool) -> Step:
    def step(x: Tensor, weights: Weights, bound: Formed, dropout: float) -> Tensor:
        return fused_ffn(
            x,
            weights.key,
            weights.value,
            bound.key,
            bound.value,
            gate=weights.gate,
            visual_scale=bound.scale,
            dropout_p=dropout,
            recompute=recompute,
            backend=backend,
        )

    return step


def _ours_positions(backend: str, recompute: bool) -> Step:
    def step(x: Tensor, weights: Weights, bound: Official, dropout: float) -> Tensor:
        return fused_ffn(
            x,
            weights.key,
            weights.value,
            bound.features,
            bound.features,
            gate=weights.gate,
            key_position=bound.key_position,
            value_position=bound.value_position,
            visual_scale=bound.scale,
            dropout_p=dropout,
            recompute=recompute,
            backend=backend,
        )

    return step


def _ours_factored(backend: str, recompute: bool) -> Step:
    def step(x: Tensor, weights: Weights, bound: Parts, dropout: float) -> Tensor:
        return fused_ffn(
            x,
            weights.key,
            weights.value,
            bound.core,
            bound.core,
            visual_basis=bound.basis,
            gate=weights.gate,
            key_position=bound.key_position,
            value_position=bound.value_position,
            visual_scale=bound.scale,
            dropout_p=dropout,
            recompute=recompute,
            backend=backend,
        )

    return step


def _on_road(step: Step, road: str) -> Step:
    """The step with the Triton backend's large steps all on one road, forward and backward; otherwise its cost model mixes them."""

    def on_road(x: Tensor, weights: Weights, bound: Any, dropout: float) -> Tensor:
        from memvp_kernels.backends.triton.gemm import override_implementation

        held: list[AbstractContextManager[None]] = []

        def enter(_grads: object) -> None:
            held.append(override_implementation(road))
            held[-1].__enter__()

        def leave(_inputs: object, _outputs: object) -> None:
            held.pop().__exit__(None, None, None)

        with override_implementation(road):
            y = step(x, weights, bound, dropout)
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(enter)
            y.grad_fn.register_hook(leave)
        return y

    return on_road


def missing_road(road: str, device: torch.device) -> str | None:
    """Why this machine can't have a road of the Triton backend, or None."""
    absent = missing_backend("triton", device)
    if absent is None and road in BY_NAME:
        from memvp_kernels.backends.triton import steps

        absent = steps.missing(road, device)
    return absent


def _backend_missing(backend: str) -> Callable[[torch.device], str | None]:
    return lambda device: missing_backend(backend, device)


def _backends(device: torch.device) -> tuple[str, ...]:
    """On a CPU "auto" is the torch backend, and the interpreter's speed says nothing."""
    return ("torch", "triton", "cuda", "auto") if device.type == "cuda" else ("torch",)


def yardstick(form: str) -> str:
    """The variant whose error is the measure for all variants of a form."""
    return _YARDSTICKS.get(form, PLAIN_PYTORCH)


def variants(device: torch.device, *, compiled: bool, recompute: bool = False) -> dict[str, Variant]:
    """All variants that make sense on a kind of device, by name; `missing` says which of them this machine lacks.

    Args:
        device: "auto" and the GPU backends are left out on a CPU.
        compiled: also the torch.compile forms (tens of seconds each on a CPU).
        recompute: ours form the pre-activations again in the backward.
    """
    found = [
        Variant("prompt", "prompt", plain_ffn),
        Variant("text", "text", plain_ffn),
        Variant("official-eager", "official", official_eager, _official),
        Variant(PLAIN_PYTORCH, "formed", formed_eager, _formed),
        Variant("factored-eager", "factored", factored_eager, lambda parts: parts),
        Variant("concatenated", "concatenated", concatenated, _formed, _concatenated),
        Variant("liger", "formed", _liger, _formed, missing=_missing_liger),
    ]
    if compiled:
        found += [
            Variant("prompt-compile", "prompt", torch.compile(plain_ffn, dynamic=False)),
            Variant("text-compile", "text", torch.compile(plain_ffn, dynamic=False)),
            Variant("official-compile", "official", torch.compile(official_eager, dynamic=False), _official),
            Variant("formed-compile", "formed", torch.compile(formed_eager, dynamic=False), _formed),
        ]
    for backend in _backends(device):
        limits: dict[str, Any] = {"missing": _backend_missing(backend)}
        if backend == "cuda":
            limits.update(training=False, rows=64)
        found += [
            Variant(f"plain-{backend}", "formed", _ours_plain(backend, recompute), _formed, **limits),
            Variant(
                f"factored-{backend}", "factored", _ours_factored(backend, recompute), lambda parts: parts, **limits
            ),
        ]
        if backend == "triton":
            for road in ROADS:
                on_road = {**limits, "missing": functools.partial(missing_road, road)}
                plain, factored = (_on_road(ours(backend, recompute), road) for ours in (_ours_plain, _ours_factored))
                found += [
                    Variant(f"plain-triton-{road}", "formed", plain, _formed, **on_road),
                    Variant(f"factored-triton-{road}", "factored", factored, lambda parts: parts, **on_road),
                ]
        if backend == "cuda":
            found.append(
                Variant("positions-cuda", "positions", _ours_positions(backend, recompute), _official, **limits)
            )
    return {variant.name: variant for variant in found}
