"""What each of the four large steps should cost on either road: its fused kernel, or the library's products with passes around them.

Both roads do the same arithmetic in the same waves (:mod:`.tiles`). The fused kernel multiplies at a share of the library's rate; the
library moves more bytes, launches more often, and has no activation in its epilogue. All of it counted, nothing timed: the same choice
on every rank and in every run. The shares are assumptions until somebody measures them, and so is every time that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import torch

from memvp_kernels.backends.triton import tiles
from memvp_kernels.backends.triton.shape import Shape
from memvp_kernels.backends.triton.tiles import Chip, Tile

__all__ = ["ROADS", "STEPS", "by_library", "fused_tile", "of_launch", "product_cycles", "step_cycles"]

ROADS = ("fused", "library")
STEPS = ("hidden", "output", "dhidden", "dinput")

#: The rate of a pipelined `tl.dot` loop over the chip's, by the matrix instruction it becomes; "pointer": on Hopper without descriptors,
#: "ieee": float32 outside the tensor cores. Assumed: with what a tile costs beside its loop, Hopper's comes to 0.90 of the library's
#: rate, within the published range (Gluon 0.92 to 1.01 of cuBLAS, plain pointers 0.40 to 0.87).
_FUSED_RATE = {"wgmma": 0.95, "tcgen05": 0.80, "mma": 0.95, "pointer": 0.68, "ieee": 0.42}
#: The library's, whose persistent kernels load the next tile and store the last one beside the products: so that a bfloat16 product of
#: 8192 x 8192 x 8192 runs at the 790 TFLOP/s that an H200 was measured at. Taken for every chip.
_LIBRARY_RATE = 1.03
_PASS_RATE = 0.90  # of the memory's bandwidth that an elementwise pass reaches; assumed


@lru_cache(tiles.REMEMBERED)
def by_library(chip: Chip, shape: Shape) -> frozenset[str]:
    """The steps that the library's road should finish first; of equal cost the fused kernel wins."""
    return frozenset(
        step for step in STEPS
        if step_cycles(chip, shape, step, "library") < step_cycles(chip, shape, step, "fused")
    )  # fmt: skip


def step_cycles(chip: Chip, shape: Shape, step: str, road: str) -> float:
    """Predicted clock cycles of one step of the forward or backward, launches included."""
    cycles = _fused_cycles(chip, shape, step) if road == "fused" else sum(_library_cycles(chip, shape, step))
    return cycles + _launches(shape, step, road) * tiles._LAUNCH_SECONDS * chip.clock * 1e9


def _launches(shape: Shape, step: str, road: str) -> int:
    if road == "fused":
        return 1
    products = shape.branches if step in ("hidden", "dinput") else 1
    return (products + (step in ("hidden", "dhidden")) if shape.pairs else 0) + (shape.slots > 0)


def fused_tile(chip: Chip, shape: Shape, step: str) -> Tile:
    """The tile that the fused kernel of a step runs with; dHidden's may take shorter steps, which cost the same."""
    launched = of_launch(shape, step)
    return tiles.hidden_tile(chip, launched) if step in ("hidden", "dhidden") else tiles.output_tile(chip, launched)


def of_launch(shape: Shape, step: str) -> Shape:
    """A call's shape as its fused launch of one step has it: dHidden has one product, dx's loops add up to P · F."""
    pairs = shape.pairs * (shape.branches if step == "dinput" else 1)
    return shape._replace(pairs=pairs, gated=shape.gated and step == "hidden")


def _fused_cycles(chip: Chip, shape: Shape, step: str) -> float:
    s, tile, launched = shape, fused_tile(chip, shape, step), of_launch(shape, step)
    if step in ("hidden", "dhidden"):
        hidden = step == "hidden"
        persistent = hidden and s.descriptors and (s.dense or not s.slots) and s.dtype != torch.float32
        cycles = tiles.hidden_cycles(chip, tile, launched, persistent)
        # What an epilogue moves beyond one result per column: hidden beside the pre-activations; those, and the gradient of each but one.
        beyond = 1 if hidden else 2 * s.branches - 1
        return cycles / _fused_rate(chip, s) + _through_l2(chip, s, beyond * s.rows * s.pairs)
    cut = s.slots > 0 and not s.dense and tiles.straddles(s.sequences, s.length, tile.block_n)
    return tiles.output_cycles(chip, tile, launched, cut) / _fused_rate(chip, s)


def _library_cycles(chip: Chip, shape: Shape, step: str) -> Iterator[float]:
    """The library's products, the passes between them, and the memory's own step."""
    s = shape
    n, d, f = s.rows, s.width, s.pairs
    if f and step == "hidden":
        yield s.branches * product_cycles(chip, s.dtype, s.precision, n, f, d)
        yield _moving(chip, s, (s.branches + 1) * n * f)
    elif f and step == "dhidden":
        yield product_cycles(chip, s.dtype, s.precision, n, f, d)
        yield _moving(chip, s, (2 * s.branches + 1) * n * f)
    elif f:
        products = s.branches if step == "dinput" else 1
        yield products * product_cycles(chip, s.dtype, s.precision, n, d, f)
        # A product that accumulates reads what the last one wrote.
        yield _moving(chip, s, (products - 1) * n * d)
    if not s.slots:
        return
    if not s.dense:
        yield _fused_cycles(chip, s._replace(pairs=0), step)  # the memory's part alone
    elif step in ("hidden", "dhidden"):
        yield product_cycles(chip, s.dtype, s.precision, n, s.slots, d)
    else:
        yield product_cycles(chip, s.dtype, s.precision, n, d, s.slots)
    if f and step in ("output", "dinput"):
        yield _moving(chip, s, n * d)


def product_cycles(chip: Chip, dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int) -> float:
    """Predicted clock cycles of one library product (rows, depth) · (depth, columns): its best tile, cut along `depth` where waves are thin."""
    best = math.inf
    moved = (rows * depth + depth * columns + rows * columns) * dtype.itemsize
    for tile in _library_tiles():
        count = math.ceil(rows / tile.block_n) * math.ceil(columns / tile.columns)
        for splits in tiles.split_choices(chip, tile, rows, columns, depth):
            steps = math.ceil(depth / (tile.block_k * splits))
            waves = math.ceil(count * splits / chip.multiprocessors)
            products = waves * steps * tiles.step_cycles(chip, tile, dtype, precision, tile.columns) / _LIBRARY_RATE
            best = min(best, max(products, moved / chip.memory) + tiles.joining_cycles(chip, rows * columns, splits))
    return best


@cache
def _library_tiles() -> list[Tile]:
    """Hopper's wide tiles, in every dtype and on every chip: hand-written kernels keep 128 accumulators a thread where Triton's spill."""
    return [*tiles.candidates(tiles.chip_of(90), torch.float16, "ieee", descriptors=True), Tile(128, 192, 64, 8, 2)]


def _fused_rate(chip: Chip, shape: Shape) -> float:
    if shape.dtype == torch.float32 and shape.precision == "ieee":
        return _FUSED_RATE["ieee"]
    if chip.family == "wgmma" and not shape.descriptors:
        return _FUSED_RATE["pointer"]
    return _FUSED_RATE[chip.family]


def _through_l2(chip: Chip, shape: Shape, numbers: float) -> float:
    """Cycles for all multiprocessors together to move so many numbers in epilogues: they take turns, so the memory keeps up."""
    return numbers * shape.dtype.itemsize / (chip.l2 * chip.multiprocessors)


def _moving(chip: Chip, shape: Shape, numbers: float) -> float:
    """Cycles to read or write so many numbers of the dtype with nothing beside it."""
    return numbers * shape.dtype.itemsize / (_PASS_RATE * chip.memory)
