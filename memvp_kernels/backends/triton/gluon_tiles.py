"""Which tile the Gluon kernels for Hopper run with: one of two, by the waves that it leaves."""

from __future__ import annotations

from functools import lru_cache

import torch

from memvp_kernels.backends.triton import tiles
from memvp_kernels.backends.triton.tiles import Chip, Tile

__all__ = ["SHAPES", "gluon_tile"]

#: Rows, accumulated columns and step of a product, warps that multiply, stages (a power of two); 192 or 128 KiB, and 32 that results leave from.
SHAPES = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 4))


@lru_cache(tiles.REMEMBERED)
def gluon_tile(chip: Chip, rows: int, columns: int) -> Tile:
    """The tile for a product of so many rows and accumulated columns; of equal cost the wide one wins."""

    def cycles(tile: Tile) -> float:
        count = -(-rows // tile.block_n) * -(-columns // tile.columns)
        step = tiles.step_cycles(chip, tile, torch.bfloat16, "ieee", tile.columns)
        return -(-count // chip.multiprocessors) * step

    return min(SHAPES, key=cycles)
