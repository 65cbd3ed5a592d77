"""Constants λ and s with which the memory of an untrained model is neither too quiet to learn nor too loud to help."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvp_kernels.models.attribution import MemoryAttribution
from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.patching.binding import bound

if TYPE_CHECKING:
    from memvp_kernels.models.model import MemVPModel

__all__ = ["Calibration", "calibrate"]

_ROUNDS = 64  # halvings of an interval of log s, below float32's own rounding
_CLOSE = 1e-3  # of the wanted share, relative
_NO_IMAGE = "calibrate: wanted a batch with images, got none; pass image_features or pixel_values"


@dataclass(frozen=True)
class Calibration:
    """What :meth:`MemVPModel.calibrate` found and set.

    Attributes:
        names: of the FFNs with memory, in the order in which they run.
        before: the memory's share of each FFN's output, averaged over the batch's tokens, as it was.
        after: the same, as it is now.
        feature_scale: λ, now.
        memory_scale: s per FFN, now.
    """

    names: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    feature_scale: float
    memory_scale: tuple[float, ...]

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        rows = zip(self.names, self.before, self.after, self.memory_scale, strict=True)
        lines = [f"{'feed-forward':<{width}}  share before  share now  memory_scale"]
        lines += [f"{name:<{width}}  {old:12.1%}  {new:9.1%}  {s:12.3g}" for name, old, new, s in rows]
        return "\n".join([*lines, f"feature_scale {self.feature_scale:.3g}"])


@torch.no_grad()
def calibrate(model: MemVPModel, batch: dict[str, Any], *, share: float, key_ratio: float) -> Calibration:
    """Set the constants of ``model``; see :meth:`MemVPModel.calibrate`."""
    for name, value, high in (("share", share, 1.0), ("key_ratio", key_ratio, math.inf)):
        if not 0.0 < value < high:
            raise ValueError(f"{name}: wanted a number between 0 and {high:g}, got {value!r}")
    if all(batch.get(name) is None for name in ("image_features", "pixel_values", "visual_core")):
        raise ValueError(_NO_IMAGE)
    config = model.memvp_config
    before = _measure(model, batch)
    try:
        _set(model, replace(config, feature_scale=_feature_scale(model, batch, key_ratio)))
        scales = (1.0,) * len(before.layers)
        for _ in range(len(scales) + 1):  # what a layer reads depends on the memory of the layers below
            used = scales
            _set(model, replace(model.memvp_config, memory_scale=used))
            found = _measure(model, batch)
            if all(abs(now - share) <= _CLOSE * share for now in _means(found)):
                break
            factors = (_factor(tokens, share) for tokens in _tokens(found))
            scales = tuple(s * factor for s, factor in zip(used, factors, strict=True))
    except Exception:
        _set(model, config)
        raise
    names = tuple(layer.name for layer in found.layers)
    return Calibration(names, _means(before), _means(found), model.memvp_config.feature_scale, used)


def _measure(model: MemVPModel, batch: dict[str, Any]) -> MemoryAttribution:
    found = model.explain_memory(**batch)
    if not found.visual_tokens.any():
        raise ValueError(_NO_IMAGE)
    return found


def _set(model: MemVPModel, config: MemVPConfig) -> None:
    model.memvp_config = config
    model.adapter().memory.config = config


def _tokens(found: MemoryAttribution) -> list[Tensor]:
    """Per layer the shares at all tokens of samples with an image."""
    shown = (found.visual_tokens > 0).unsqueeze(1)
    return [layer.share[layer.valid & shown] for layer in found.layers]


def _means(found: MemoryAttribution) -> tuple[float, ...]:
    return tuple(tokens.mean().item() for tokens in _tokens(found))


def _factor(shares: Tensor, wanted: float) -> float:
    """What multiplies s so that tokens of these shares have the wanted one on average.

    A token's share is m / (m + own), m linear in s and own not: a factor c makes it c·r / (c·r + 1), r = m / own.
    """
    ratio = shares.double() / (1 - shares.double()).clamp_min(1e-30)
    low, high = -60.0, 60.0  # log c
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        scaled = ratio * math.exp(middle)
        low, high = (middle, high) if (scaled / (scaled + 1)).mean() < wanted else (low, middle)
    return math.exp(low)


def _feature_scale(model: MemVPModel, batch: dict[str, Any], ratio: float) -> float:
    """λ with which an image's part of the memory keys is ``ratio`` times as large as their positions, root mean squares."""
    found: list[float] = []

    def observe(layer: int, x: Tensor, y: Tensor) -> None:
        binding = bound()
        assert binding is not None
        if layer == 0:
            memory = binding.memory
            rows = (memory.core @ memory.basis).flatten(0, -2)
            image, position = rows[rows.any(dim=-1)], memory.key_position
            found.append((_size(position) / _size(image)).item())

    with model.observing(observe):
        model(**batch)
    if not math.isfinite(found[0]):
        raise ValueError("calibrate: wanted images whose projection is not zero, got zeros; is feature_scale 0?")
    return ratio * found[0] * model.memvp_config.feature_scale


def _size(t: Tensor) -> Tensor:
    return t.float().square().mean().sqrt()
