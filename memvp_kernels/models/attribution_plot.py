"""A :class:`~memvp_kernels.models.attribution.MemoryAttribution` drawn over the image's patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memvp_kernels.models.attribution import MemoryAttribution

__all__ = ["draw"]

_MOST_LAYERS = 6
_MEMORY = "#c44e52"
_FFN = "#d9d9d9"


def draw(
    attribution: MemoryAttribution,
    image: Tensor,
    *,
    sample: int = 0,
    grid: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """See :meth:`~memvp_kernels.models.attribution.MemoryAttribution.plot`."""
    from matplotlib.figure import Figure

    count = len(attribution.layers)
    tokens = int(attribution.visual_tokens[sample])
    grids = attribution.pooled_grids
    rows, columns = _grid(tokens, grid) if not grids or not tokens else (0, 0)
    chosen = _spread(count) if layers is None else list(layers)
    picture = image.detach().float().cpu()
    if picture.dim() == 3 and picture.shape[0] in (1, 3):
        picture = picture.permute(1, 2, 0).squeeze(-1)
    height, width = picture.shape[:2]
    pixels = picture.numpy()

    figure = Figure(figsize=(1.9 * (len(chosen) + 1) + 3.2, 2.6), layout="constrained")
    panels: Any = figure.subplots(1, len(chosen) + 2, width_ratios=[1.0] * (len(chosen) + 1) + [1.6])
    panels[0].imshow(pixels, cmap="gray", extent=(0, width, height, 0))
    panels[0].set_title("image", fontsize=9)
    for panel, number in zip(panels[1:-1], chosen, strict=True):
        layer = attribution.layers[number]
        slots = layer.mean_slots()[sample]
        heat = _overlaid(slots[:tokens], grids) if grids else slots[:tokens].reshape(rows, columns)
        free = float(slots[tokens:].sum() / slots.sum().clamp_min(torch.finfo(torch.float32).tiny))
        panel.imshow(pixels, cmap="gray", extent=(0, width, height, 0))
        panel.imshow(heat.numpy(), cmap="inferno", alpha=0.65, extent=(0, width, height, 0), interpolation="bilinear")
        panel.set_title(f"layer {number}" + (f"\nfree slots {free:.0%}" if tokens < len(slots) else ""), fontsize=9)
    for panel in panels[:-1]:
        panel.set_xticks([])
        panel.set_yticks([])
    shares = attribution.shares()[sample].tolist()
    bars = panels[-1]
    bars.barh(range(count), 1.0, color=_FFN, label="FFN")
    bars.barh(range(count), shares, color=_MEMORY, label="memory")
    bars.set_yticks(range(count) if count <= 12 else range(0, count, 4))
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_ylabel("layer", fontsize=8)
    bars.set_title("share of the FFN's output", fontsize=9)
    bars.tick_params(labelsize=8)
    bars.legend(fontsize=7, loc="lower right")
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _grid(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if tokens == 0:
        raise ValueError("this sample has no image, so there are no patches to draw over")
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"the sample's {tokens} visual tokens are no square of patches: say grid=(rows, columns)")
        return side, side
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {grid} has {grid[0] * grid[1]} patches, the sample has {tokens} visual tokens")
    return grid


def _overlaid(slots: Tensor, grids: tuple[int, ...]) -> Tensor:
    """What the cells of several grids add at each place, on the finest."""
    sides = [math.isqrt(cells) for cells in grids]
    finest = max(sides)
    parts = zip(torch.split(slots, list(grids)), sides, strict=True)
    laid = [F.interpolate(part.view(1, 1, side, side), finest)[0, 0] * (side / finest) ** 2 for part, side in parts]
    return torch.stack(laid).sum(dim=0)


def _spread(count: int) -> list[int]:
    if count <= _MOST_LAYERS:
        return list(range(count))
    return [round(i * (count - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS)]
