"""Tiles of the warp-specialised Hopper kernels, in Gluon and in CUDA C++: 128 rows by so many columns that the waves come out even.

A program keeps one multiprocessor and walks through its tiles. One warp asks for operands ahead, over the edge of a tile, so a tile costs its
products and the store of its result, and the first one the time until its operands are there. A hand-written kernel may have any width that
wgmma has; Gluon's tensors have powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from memvp_kernels.backends.triton import tiles
from memvp_kernels.backends.triton.shape import Shape
from memvp_kernels.backends.triton.tiles import Chip

__all__ = ["BLOCK_K", "BLOCK_N", "RingTile", "fits", "ring_cycles", "ring_tile"]

BLOCK_N, BLOCK_K = 128, 64
_WIDTHS = {"gluon": (256, 128), "wgmma": (256, 240, 224, 208, 192, 176, 160, 144, 128)}
_STAGED = 32 * 1024  # bytes through which results leave
_BARRIERS = 1024


class RingTile(NamedTuple):
    """One configuration: accumulated columns (gate's and key's together), stages of the ring, row tiles that share columns in L2."""

    columns: int
    stages: int
    group: int = 8


def fits(chip: Chip, shape: Shape) -> bool:
    """Whether such a kernel can take this problem's dense products."""
    return chip.family == "wgmma" and shape.descriptors and shape.dtype in (torch.bfloat16, torch.float16)


def _tiles(chip: Chip, road: str) -> Iterator[RingTile]:
    for columns in _WIDTHS[road]:
        stage = (BLOCK_N + columns) * BLOCK_K * 2
        yield RingTile(columns, (chip.shared - _STAGED - _BARRIERS) // stage)


@lru_cache(tiles.REMEMBERED)
def ring_tile(chip: Chip, shape: Shape, step: str, road: str) -> RingTile:
    """The tile that a step runs with on a road; of equal cost the widest."""
    return min(_tiles(chip, road), key=lambda tile: ring_cycles(chip, shape, step, tile))


def ring_cycles(chip: Chip, shape: Shape, step: str, tile: RingTile, rate: float = 1.0) -> float:
    """Predicted clock cycles of a step's dense products in one launch.

    Args:
        rate: of the loop over the tensor cores'.
    """
    s = shape
    slots = s.slots if s.dense else 0
    halves = s.branches if step == "hidden" else 1
    if step in ("hidden", "dhidden"):
        columns = math.ceil(s.pairs * halves / tile.columns) + math.ceil(slots / tile.columns)
        steps, width = math.ceil(s.width / BLOCK_K), s.pairs * halves + slots
        depth = s.width
    else:
        products = s.branches if step == "dinput" else 1
        columns, width = math.ceil(s.width / tile.columns), s.width
        steps = products * math.ceil(s.pairs / BLOCK_K) + math.ceil(slots / BLOCK_K)
        depth = products * s.pairs + slots
    waves = math.ceil(math.ceil(s.rows / BLOCK_N) * columns / chip.multiprocessors)
    step_cycles = 2 * BLOCK_N * tile.columns * BLOCK_K / (chip.tensor * tiles.wide_efficiency(tile.columns) * rate)
    delivered = (BLOCK_N + tile.columns) * BLOCK_K * s.dtype.itemsize / chip.l2
    store = BLOCK_N * tile.columns * s.dtype.itemsize / chip.l2
    moved = (s.rows * depth + depth * width + s.rows * width) * s.dtype.itemsize
    return max(tiles.FILL + waves * (steps * max(step_cycles, delivered) + store), moved / chip.memory)
