"""What each of the four large steps should cost on each road, and which road a problem's steps take.

    fused    one Triton kernel for the whole step
    library  the vendor's products, with passes around them
    wgmma    one warp-specialised kernel in CUDA C++ (the extension), Hopper only

All roads do the same arithmetic in waves of tiles. The fused kernel multiplies at a share of the library's rate; the library moves more
bytes, launches more often, and has no activation in its epilogue; the last two keep the library's loop and the fused epilogue. All of it counted,
nothing timed: the same choice on every rank and in every run. The rates (:mod:`.rates`) are assumptions until somebody measures them, and
so is every time that follows from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, lru_cache

import torch

from memvp_kernels.backends.triton.heuristics import hopper_tiles as ring_tiles
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.rates import RATES, Rates
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Chip, Tile

__all__ = ["CHOSEN_FROM", "ROADS", "STEPS", "choice", "fused_tile", "of_launch", "product_cycles", "step_cycles"]

ROADS = ("fused", "library", "wgmma")
#: What a choice is made from. The last two of `ROADS` have barriers of their own between their warps, checked by interpreters and on no
#: GPU yet: where a mistake could hang a training run they have to be asked for (`steps.forced`) until one has run them.
CHOSEN_FROM = ("fused", "library")
STEPS = ("hidden", "output", "dhidden", "dinput")


@lru_cache(tiles.REMEMBERED)
def choice(chip: Chip, shape: Shape, among: tuple[str, ...] = CHOSEN_FROM) -> tuple[str, ...]:
    """For each of `STEPS` the road that should finish it first; of equal cost the first of `among`."""
    return tuple(min(among, key=lambda road: step_cycles(chip, shape, step, road)) for step in STEPS)


def step_cycles(chip: Chip, shape: Shape, step: str, road: str, rates: Rates = RATES) -> float:
    """Predicted clock cycles of one step of the forward or backward, launches included; infinite where the road can't take it."""
    if road == "fused":
        cycles = _fused_cycles(chip, shape, step, rates)
    elif road == "library":
        cycles = sum(_library_cycles(chip, shape, step, rates))
    else:
        cycles = sum(_ring_cycles(chip, shape, step, road, rates))
    library, own = launches(shape, step, road)
    return cycles + library * rates.launch * chip.clock * 1e9 + own * tiles.launch_cycles(chip, rates)


def launches(shape: Shape, step: str, road: str) -> tuple[int, int]:
    """Of one step: the library's, and those of the package's own kernels, which may begin while the one before them ends."""
    if road == "fused":
        return 0, 1
    if road != "library":
        beside = int(shape.slots > 0 and not _within(shape, step, road))
        return 0, int(shape.pairs > 0 or not beside) + beside
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


def _fused_cycles(chip: Chip, shape: Shape, step: str, rates: Rates) -> float:
    s, tile, launched = shape, fused_tile(chip, shape, step), of_launch(shape, step)
    if step in ("hidden", "dhidden"):
        persistent = step == "hidden" and s.descriptors and (s.dense or not s.slots) and s.dtype != torch.float32
        cycles = tiles.hidden_cycles(chip, tile, launched, persistent)
        return cycles / _fused_rate(chip, s, rates) + _beyond(chip, s, step)
    cut = s.slots > 0 and not s.dense and tiles.straddles(s.sequences, s.length, tile.block_n)
    return tiles.output_cycles(chip, tile, launched, cut) / _fused_rate(chip, s, rates)


def _ring_cycles(chip: Chip, shape: Shape, step: str, road: str, rates: Rates) -> Iterator[float]:
    """Everything dense in one launch of programs that stay; a memory per sequence by the fused kernel's tiles alone, added afterwards."""
    s = shape
    if not ring_tiles.fits(chip, s):
        yield math.inf
        return
    inside = s.slots > 0 and _within(s, step, road)
    if s.pairs or inside:
        slots = s.slots if inside else 0
        columns: tuple[int, ...]
        if step in ("hidden", "dhidden"):
            columns, depth = (s.pairs * (s.branches if step == "hidden" else 1), slots), s.width
        else:
            columns, depth = (s.width,), s.pairs * (s.branches if step == "dinput" else 1) + slots
        tile = ring_tiles.ring_tile(chip, road, s.rows, columns, depth)
        yield ring_tiles.ring_cycles(chip, road, tile, s.rows, columns, depth, rates.extension)
        yield _beyond(chip, s, step)
    if s.slots and not inside:
        yield _fused_cycles(chip, s._replace(pairs=0), step, rates)
        if s.pairs and step in ("output", "dinput"):
            yield _moving(chip, s, s.rows * s.width, rates)


def _within(shape: Shape, step: str, road: str) -> bool:
    """Whether a warp-specialised kernel has the memory among its own products: a shared one, or one per sequence where no tile straddles two."""
    return shape.dense


def _beyond(chip: Chip, shape: Shape, step: str) -> float:
    """What a fused epilogue moves beyond one result per column: hidden beside the pre-activations; those, and the gradient of each but one."""
    numbers = {"hidden": 1, "dhidden": 2 * shape.branches - 1}.get(step, 0) * shape.rows * shape.pairs
    # The multiprocessors take turns at their epilogues, so the memory keeps up and L2 decides.
    return numbers * shape.dtype.itemsize / (chip.l2 * chip.multiprocessors)


def _library_cycles(chip: Chip, shape: Shape, step: str, rates: Rates) -> Iterator[float]:
    """The library's products, the passes between them, and the memory's own step."""
    s = shape
    n, d, f = s.rows, s.width, s.pairs

    def product(columns: int, depth: int) -> float:
        return product_cycles(chip, s.dtype, s.precision, n, columns, depth, rates.library)

    if f and step == "hidden":
        yield s.branches * product(f, d)
        yield _moving(chip, s, (s.branches + 1) * n * f, rates)
    elif f and step == "dhidden":
        yield product(f, d)
        yield _moving(chip, s, (2 * s.branches + 1) * n * f, rates)
    elif f:
        products = s.branches if step == "dinput" else 1
        yield products * product(d, f)
        # A product that accumulates reads what the last one wrote.
        yield _moving(chip, s, (products - 1) * n * d, rates)
    if not s.slots:
        return
    if not s.dense:
        yield _fused_cycles(chip, s._replace(pairs=0), step, rates)  # the memory's part alone
    elif step in ("hidden", "dhidden"):
        yield product(s.slots, d)
    else:
        yield product(d, s.slots)
    if f and step in ("output", "dinput"):
        yield _moving(chip, s, n * d, rates)


def product_cycles(
    chip: Chip, dtype: torch.dtype, precision: str, rows: int, columns: int, depth: int, rate: float = RATES.library
) -> float:
    """Predicted clock cycles of one library product (rows, depth) · (depth, columns): its best tile, cut along `depth` where waves are thin."""
    best = math.inf
    moved = (rows * depth + depth * columns + rows * columns) * dtype.itemsize
    for tile in _library_tiles():
        count = math.ceil(rows / tile.block_n) * math.ceil(columns / tile.columns)
        for splits in tiles.split_choices(chip, tile, rows, columns, depth):
            steps = math.ceil(depth / (tile.block_k * splits))
            waves = math.ceil(count * splits / chip.multiprocessors)
            products = waves * steps * tiles.step_cycles(chip, tile, dtype, precision, tile.columns) / rate
            best = min(best, max(products, moved / chip.memory) + tiles.joining_cycles(chip, rows * columns, splits))
    return best


@cache
def _library_tiles() -> list[Tile]:
    """Hopper's wide tiles, in every dtype and on every chip: hand-written kernels keep 128 accumulators a thread where Triton's spill."""
    return [*tiles.candidates(tiles.chip_of(90), torch.float16, "ieee", descriptors=True), Tile(128, 192, 64, 8, 2)]


def _fused_rate(chip: Chip, shape: Shape, rates: Rates) -> float:
    if shape.dtype == torch.float32 and shape.precision == "ieee":
        return rates.ieee
    if chip.family == "wgmma" and not shape.descriptors:
        return rates.pointer
    return {"wgmma": rates.wgmma, "tcgen05": rates.tcgen05, "mma": rates.mma}[chip.family]


def _moving(chip: Chip, shape: Shape, numbers: float, rates: Rates) -> float:
    """Cycles to read or write so many numbers of the dtype with nothing beside it."""
    return numbers * shape.dtype.itemsize / (rates.elementwise * chip.memory)
