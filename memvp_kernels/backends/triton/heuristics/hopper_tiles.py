"""Tiles of the warp-specialised Hopper kernels: 128 rows by the columns that leave the evenest waves.

A program keeps one multiprocessor and walks through its tiles. One warp asks for operands ahead, over the edge of a tile, so a tile costs its
products and the store of its result, and only a program's first one the time until its operands are there.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Chip, Tile

__all__ = ["TILES", "fits", "ring_cycles", "ring_tile"]

#: By road, widest first: rows, accumulated columns (gate's and key's together) and step of a product, warps that multiply, stages.
TILES: dict[str, tuple[Tile, ...]] = {
    "wgmma": (Tile(128, 256, 64, 8, 4), Tile(64, 256, 64, 4, 4)),
}
#: Programs that have the same columns side by side, each of which copies its share of the right operand to all (csrc/hopper/plan.h).
_CLUSTER = {"wgmma": 2}
_ITEMSIZE = 2


def fits(chip: Chip, shape: Shape) -> bool:
    """Whether such kernels can take a problem's dense products."""
    return chip.family == "wgmma" and shape.descriptors and shape.dtype in (torch.bfloat16, torch.float16)


@lru_cache(tiles.REMEMBERED)
def ring_tile(chip: Chip, road: str, rows: int, columns: tuple[int, ...], depth: int) -> Tile:
    """The tile of a launch, see `ring_cycles`; of equal cost the widest."""
    return min(TILES[road], key=lambda tile: ring_cycles(chip, road, tile, rows, columns, depth))


def ring_cycles(
    chip: Chip, road: str, tile: Tile, rows: int, columns: tuple[int, ...], depth: int, rate: float = 1.0
) -> float:
    """Predicted clock cycles of one launch.

    Args:
        rows: of the result.
        columns: of each of its parts, which have tiles of their own: an FFN's (gate's and key's together), then a shared memory's.
        depth: of the sums, of all products in a tile together.
        rate: of the loop over the tensor cores'.
    """
    count = math.ceil(rows / tile.block_n) * sum(math.ceil(c / tile.columns) for c in columns)
    waves = math.ceil(count / chip.multiprocessors)
    flops = 2 * tile.block_n * tile.columns * tile.block_k
    products = flops / (chip.tensor * tiles.wide_efficiency(tile.columns) * rate)
    delivered = (tile.block_n + tile.columns / _CLUSTER[road]) * tile.block_k * _ITEMSIZE / chip.l2
    store = tile.block_n * tile.columns * _ITEMSIZE / chip.l2
    moved = (rows * depth + (depth + rows) * sum(columns)) * _ITEMSIZE
    cycles = tiles.FILL + waves * (math.ceil(depth / tile.block_k) * max(products, delivered) + store)
    return max(cycles, moved / chip.memory)
