"""Which tile each backward kernel runs with: the same cost model as :mod:`.tiles`, on the backward's own shapes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, lru_cache

import torch

from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.hardware import Chip

__all__ = ["core_backward_tile", "dhidden_tile", "dinput_tile", "dmemory_tile", "row_splits"]

_RESERVE = 2 * 1024  # bytes of barriers and descriptors beside the stages

# (slots, columns, rows per step, warps, most stages) of a tile of a memory gradient. Slots come in multiples of 64 (320 = 5 · 64).
_OUTER_SHAPES = {
    "descriptors": (64, 256, 64, 4, 4),
    # Steps of 64 spilled 16 bytes on sm_80 with Triton 3.6, and a fourth stage 8 to 40 at ranks of 48 and 300.
    "pointers": (64, 128, 32, 8, 3),
    "elements": (64, 64, 16, 4, 3),  # steps of 32 spilled 80 bytes on sm_100
    "tf32": (64, 128, 16, 4, 4),  # steps of 32 spilled 8 bytes on sm_80 with Triton 3.6
    "ieee": (32, 64, 32, 4, 2),  # 64 slots spilled 8 bytes on sm_90 and sm_100
}


def dhidden_tile(chip: Chip, shape: Shape) -> Tile:
    """The dHidden kernel's tile: that of a hidden kernel without a gate, whose epilogue works in column subtiles and needs no more room."""
    return _with_room(tiles.hidden_tile(chip, shape), chip, shape)


def dinput_tile(chip: Chip, shape: Shape) -> Tile:
    """The dx kernel's tile: the output kernel's, with `pairs` the length of both dense loops together."""
    return _with_room(tiles.output_tile(chip, shape), chip, shape)


def _with_room(tile: Tile, chip: Chip, shape: Shape) -> Tile:
    """The tile with room for a backward's epilogue, which reads more than a forward's.

    Half the K step where pointers to a step of 64, in only four warps, leave too few registers for accumulator and epilogue; other
    stages and warps for IEEE float32.
    """
    crowded = tile.block_n * tile.columns // (32 * tile.warps) >= 32 and tile.warps == 4 and tile.block_k > 32
    loading = tiles.loading(chip, shape.dtype, shape.precision, shape.descriptors)
    if loading == "ieee" and tile.block_k > 16:
        # Three stages spilled 8 bytes of dhidden on sm_90, and four warps 16 bytes of it on sm_80 with Triton 3.6.
        return replace(tile, warps=8 if chip.family == "mma" else tile.warps, stages=2)
    return replace(tile, block_k=32) if crowded and loading == "pointers" else tile


@lru_cache(tiles.CACHE_SIZE)
def dmemory_tile(
    chip: Chip, dtype: torch.dtype, precision: str, *, width: int, descriptors: bool, together: bool = False
) -> Tile:
    """The tile of dKv and dVv: `block_n` slots by `columns` of the memory, in steps of `block_k` rows of x.

    Args:
        together: both products go into one result, in two loops one after the other.
    """
    # IEEE's tile in vectors, loaded one by one, spilled 120 bytes on sm_80.
    kind = tiles.loading(chip, dtype, precision, descriptors) if descriptors else "elements"
    slots, columns, step, warps, most = _OUTER_SHAPES[kind]
    if kind == "descriptors" and chip.family != "wgmma":
        # tcgen05 wants 128 rows, and its float32 results spill at 256 columns; mma.sync keeps its accumulators in registers.
        slots, columns, warps = (128, 128, 8) if chip.family == "tcgen05" else (64, 128, 4)
        if together and chip.family == "tcgen05":
            # Between two loops the sum leaves tensor memory: more columns or stages, shorter steps or eight warps spilled.
            columns, step, warps, most = 64, 128, 4, 2
    if kind == "ieee" and chip.family == "mma":
        warps = 8  # four spilled 8 bytes with Triton 3.6
    columns = min(columns, tiles._bucket(width))
    if kind == "pointers" and columns <= 64:
        warps = 4  # eight spilled 16 bytes on sm_80 at a rank of 48
    stages = min(most, (chip.shared_memory - _RESERVE) // ((slots + columns) * step * dtype.itemsize))
    return Tile(slots, columns, step, warps, stages)


@cache
def row_splits(multiprocessors: int, outputs: int, steps: int) -> int:
    """How many splits a product over all rows takes, whose partial sums are then added.

    Args:
        outputs: tiles of the result.
        steps: steps of its loop over the rows, as a power of two.
    """

    def cost(splits: int) -> float:
        # Storing a partial sum in float32 and reading it back costs about four steps of the loop.
        return math.ceil(outputs * splits / multiprocessors) * (math.ceil(steps / splits) + 4 * (splits > 1))

    return min((s for s in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if s <= steps), key=cost, default=1)


@lru_cache(tiles.CACHE_SIZE)
def core_backward_tile(chip: Chip, dtype: torch.dtype, precision: str, *, rows: int, rank: int) -> Tile:
    """The core backward's tile: `columns` of dS A and of visual A at once, steps of `block_k` slots."""
    odd = rank % 8 != 0  # then a core is loaded element by element
    columns = min(64 if odd or dtype == torch.float32 else 128, tiles._bucket(rank))
    if dtype == torch.float32:
        return Tile(16 if precision == "ieee" else 32, columns, 16, 4, 2)
    block_n = 64 if tiles._bucket(rows) >= 32 * chip.multiprocessors else 32 if rows > 256 else 16
    if odd:
        return Tile(min(block_n, 32), columns, 16, 4, 2)
    # Steps of 64 slots spill: scores, their slope and dropout's generator are alive beside the accumulators of t and u. So did steps
    # of 32 on sm_80 at a rank of 48, on sm_90 and sm_120 with Triton 3.9, and on sm_100 in tiles of 16 rows with Triton 3.6.
    crowded = block_n == (16 if chip.family == "tcgen05" else 64)
    return Tile(block_n, columns, 16 if crowded else 32, 8 if block_n == 64 else 4, 2)
