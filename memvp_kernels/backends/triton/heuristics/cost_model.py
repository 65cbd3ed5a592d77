"""What each of the four large steps should cost in either implementation of large products, and which one a problem's steps take.

Both do the same arithmetic in waves of tiles. The fused kernels multiply at a share of cuBLAS's rate; cuBLAS moves more bytes, launches more
often, and has no activation in its epilogue. Everything is counted and nothing timed: every rank and every run chooses the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import torch

from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.hardware import RATES, Chip, chip_of

__all__ = ["NAMES", "STEPS", "choice", "fused_tile", "launches", "of_launch", "product_cycles", "step_cycles"]

#: Of equal cost the first is taken.
NAMES = ("fused", "cublas")
STEPS = ("hidden", "output", "dhidden", "dinput")


@lru_cache(tiles.CACHE_SIZE)
def choice(chip: Chip, shape: Shape) -> tuple[str, ...]:
    """For each of `STEPS` the implementation that should finish it first."""
    return tuple(min(NAMES, key=lambda name: step_cycles(chip, shape, step, name)) for step in STEPS)


def step_cycles(chip: Chip, shape: Shape, step: str, name: str) -> float:
    """Predicted clock cycles of one step of the forward or backward, launches included."""
    cycles = _fused_cycles(chip, shape, step) if name == "fused" else sum(_cublas_cycles(chip, shape, step))
    library, own = launches(shape, step, name)
    launch_own = RATES.launch_pdl if chip.has_pdl else RATES.launch
    return cycles + chip.cycles(library * RATES.launch + own * launch_own)


def launches(shape: Shape, step: str, name: str) -> tuple[int, int]:
    """Of one step: cuBLAS's, and those of the package's own kernels, which may begin while the one before them ends."""
    if name == "fused":
        return 0, 1
    products = shape.branches if step in ("hidden", "dinput") else 1
    shared = int(shape.slots > 0 and shape.dense)
    alone = int(shape.slots > 0 and not shape.dense)
    passes = int(step in ("hidden", "dhidden"))
    return (products if shape.pairs else 0) + shared, (passes if shape.pairs else 0) + alone


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
        persistent = step == "hidden" and s.descriptors and (s.dense or not s.slots) and s.dtype != torch.float32
        cycles = tiles.hidden_cycles(chip, tile, launched, persistent)
        return cycles / _fused_rate(chip, s) + _epilogue_cycles(chip, s, step)
    straddles = s.slots > 0 and not s.dense and tiles.straddles(s.sequences, s.length, tile.block_n)
    return tiles.output_cycles(chip, tile, launched, straddles) / _fused_rate(chip, s)


def _epilogue_cycles(chip: Chip, shape: Shape, step: str) -> float:
    """What a fused epilogue moves beyond one result per column: hidden beside the pre-activations; those, and the gradient of each but one."""
    numbers = {"hidden": 1, "dhidden": 2 * shape.branches - 1}.get(step, 0) * shape.rows * shape.pairs
    # The multiprocessors take turns at their epilogues, so the memory keeps up and L2 decides.
    return numbers * shape.dtype.itemsize / (chip.l2 * chip.multiprocessors)


def _cublas_cycles(chip: Chip, shape: Shape, step: str) -> Iterator[float]:
    """cuBLAS's products, the passes between them, and the memory's own step."""
    s = shape
    n, d, f = s.rows, s.width, s.pairs

    def product(columns: int, depth: int) -> float:
        return product_cycles(chip, s.dtype, s.precision, n, columns, depth)

    if f and step == "hidden":
        yield s.branches * product(f, d)
        yield _pass_cycles(chip, s, (s.branches + 1) * n * f)
    elif f and step == "dhidden":
        yield product(f, d)
        yield _pass_cycles(chip, s, (2 * s.branches + 1) * n * f)
    elif f:
        products = s.branches if step == "dinput" else 1
        yield products * product(d, f)
        # A product that accumulates reads what the last one wrote.
        yield _pass_cycles(chip, s, (products - 1) * n * d)
    if not s.slots:
        return
    if not s.dense:
        yield _fused_cycles(chip, s._replace(pairs=0), step)  # the memory's part alone
    elif step in ("hidden", "dhidden"):
        yield product(s.slots, d)
    else:
        yield product(d, s.slots)
    if f and step in ("output", "dinput"):
        yield _pass_cycles(chip, s, n * d)


def product_cycles(chip: Chip, dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int) -> float:
    """Predicted clock cycles of one cuBLAS product (rows, depth) · (depth, columns): its best tile, with split-K where waves are thin."""
    best = math.inf
    moved = (rows * depth + depth * columns + rows * columns) * dtype.itemsize
    for tile in _cublas_tiles():
        count = math.ceil(rows / tile.block_n) * math.ceil(columns / tile.columns)
        for splits in tiles.split_choices(chip, tile, rows, columns, depth):
            steps = math.ceil(depth / (tile.block_k * splits))
            waves = math.ceil(count * splits / chip.multiprocessors)
            step = tiles.step_cycles(chip, tile, dtype, precision, tile.columns)
            products = waves * steps * step / RATES.cublas
            best = min(best, max(products, moved / chip.memory) + tiles.reduce_cycles(chip, rows * columns, splits))
    return best


@cache
def _cublas_tiles() -> list[Tile]:
    """Hopper's wide tiles, in every dtype and on every chip: hand-written kernels keep 128 accumulators a thread where Triton's spill."""
    return [*tiles.candidates(chip_of(90), torch.float16, "ieee", descriptors=True), Tile(128, 192, 64, 8, 2)]


def _fused_rate(chip: Chip, shape: Shape) -> float:
    if shape.dtype == torch.float32 and shape.precision == "ieee":
        return RATES.ieee
    if chip.family == "wgmma" and not shape.descriptors:
        return RATES.pointer
    return {"wgmma": RATES.wgmma, "tcgen05": RATES.tcgen05, "mma": RATES.mma}[chip.family]


def _pass_cycles(chip: Chip, shape: Shape, numbers: float) -> float:
    """Cycles to read or write so many numbers of the dtype with nothing beside it."""
    return numbers * shape.dtype.itemsize / (RATES.elementwise * chip.memory)
