"""One decode step of an FFN: a token of each sequence, about no image, one image for all, or an image each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import ffn_case
from harness.cli import Setting
from harness.measure import Candidate
from harness.operands import Parts, Weights
from harness.variants import Step, Variant, plain_ffn, variants
from memvp_kernels import fused_ffn
from memvp_kernels.backends.cuda import forced
from memvp_kernels.dispatch import missing as missing_backend

__all__ = ["IMAGES", "Joined", "candidates", "factored_joined", "join"]

#: How many images the tokens of a step are about, the commonest first.
IMAGES = ("each", "none", "one")


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


def join(parts: Parts) -> Joined:
    """The memory of `parts`, joined."""
    key, value = (torch.cat([parts.basis, position]) for position in (parts.key_position, parts.value_position))
    return Joined(key, parts.scale * value, parts.core)


def factored_joined(x: Tensor, weights: Weights, bound: Joined, _dropout: float) -> Tensor:
    """The best that PyTorch does without this package: products accumulated where an op can."""
    r = bound.core.shape[-1]
    columns = F.linear(x, bound.key)
    visual = F.silu(torch.baddbmm(columns[..., r:], columns[..., :r], bound.core.transpose(1, 2)))
    memory = torch.cat([visual @ bound.core, visual], -1)
    return torch.addmm(plain_ffn(x, weights).flatten(0, 1), memory.flatten(0, 1), bound.value).view_as(x)


def candidates(setting: Setting, *, tokens: int, images: str, visual_tokens: int) -> list[Candidate]:
    """The variants of one step.

    Args:
        setting: device, dtype, preset.
        tokens: N. With `images` "one" they are one sequence's, so that plain PyTorch, too, reads the image once.
        images: one of IMAGES.
        visual_tokens: tokens of an image.
    """
    together = images == "one"
    return ffn_case.candidates(
        setting,
        sequences=1 if together else tokens,
        text_length=tokens if together else 1,
        visual_tokens=visual_tokens,
        decode=not together,
        chosen=_text_variants(setting) if images == "none" else _memory_variants(setting),
    )


def _text_variants(setting: Setting) -> dict[str, Variant]:
    names = ["text", "text-compile"]
    found = {name: variant for name, variant in _all(setting).items() if name in names}
    for backend in _backends(setting):
        found[f"text-{backend}"] = Variant(f"text-{backend}", "text", _text_step(backend), missing=_missing(backend))
    return found


def _memory_variants(setting: Setting) -> dict[str, Variant]:
    ours = [f"factored-{backend}" for backend in _backends(setting)]
    names = ["text", "official-eager", "formed-eager", "official-compile", "formed-compile", "positions-cuda", *ours]
    found = {name: variant for name, variant in _all(setting).items() if name in names}
    if "factored-cuda" in found:
        for form in ("chained", "one launch"):
            name = f"factored-cuda-{form.replace(' ', '-')}"
            found[name] = replace(found["factored-cuda"], name=name, step=_in_form(found["factored-cuda"].step, form))
    found["factored-joined"] = Variant("factored-joined", "factored", factored_joined, join)
    if setting.compiled:
        step = torch.compile(factored_joined, dynamic=False)
        found["factored-compile"] = Variant("factored-compile", "factored", step, join)
    return found


def _in_form(step: Step, form: str) -> Step:
    """The cuda backend's step with its phases in one form; otherwise it goes by the chip."""

    def in_form(x: Tensor, weights: Weights, bound: Any, dropout: float) -> Tensor:
        with forced(form):
            return step(x, weights, bound, dropout)

    return in_form


def _all(setting: Setting) -> dict[str, Variant]:
    return variants(setting.device, compiled=setting.compiled)


def _backends(setting: Setting) -> tuple[str, ...]:
    return ("triton", "cuda", "auto") if setting.device.type == "cuda" else ("torch",)


def _text_step(backend: str) -> Callable[[Tensor, Weights, None, float], Tensor]:
    def step(x: Tensor, weights: Weights, _bound: None, _dropout: float) -> Tensor:
        return fused_ffn(x, weights.key, weights.value, gate=weights.gate, backend=backend)

    return step


def _missing(backend: str) -> Callable[[torch.device], str | None]:
    return lambda device: missing_backend(backend, device)
