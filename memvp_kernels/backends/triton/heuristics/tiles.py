"""Which tile each kernel runs with: a deterministic cost model in plain Python, and no timing at run time.

A tile is a candidate only if its operands' stages fit the block's shared memory and its accumulators the registers (or, on sm_100, the
tensor memory); the fewest predicted cycles win. Rows and sequences enter in powers of two, so a model that sees every length compiles a
handful of kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.hardware import RATES, Chip

__all__ = [
    "CACHE_SIZE",
    "FILL",
    "Tile",
    "candidates",
    "core_tile",
    "epilogue_columns",
    "hidden_cycles",
    "hidden_tile",
    "is_persistent",
    "loading",
    "output_cycles",
    "output_tile",
    "reduce_cycles",
    "split_choices",
    "step_cycles",
    "straddles",
    "wide_efficiency",
]


@dataclass(frozen=True)
class Tile:
    """One configuration of a kernel.

    Attributes:
        block_n: rows of x.
        columns: columns of the result: pairs (hidden; with a gate as many again beside them), or of d (output).
        block_k: step of the K loop.
        warps, stages: Triton's num_warps and num_stages.
        group: row tiles that run side by side and share columns in L2.
        splits: of the K loop (split-K), for the kernels that can (output, dx).
    """

    block_n: int
    columns: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    splits: int = 1


# (block_n, accumulated columns, block_k, warps, most stages), widest first: of equal cost the first wins.
_SHAPES: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "descriptors": (
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 6),
        (64, 128, 64, 4, 6),
        (64, 64, 128, 4, 6),
        (64, 32, 128, 4, 8),
    ),
    "pointers": (
        (128, 128, 32, 8, 4),
        (64, 128, 32, 8, 5),
        (64, 64, 64, 4, 4),
        (32, 64, 64, 4, 4),
        (16, 64, 64, 4, 5),
    ),
    # One load for every element, each with its own address: anything larger spills, 128x128 of TF32 88 bytes on sm_90.
    "elements": ((64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (16, 64, 32, 4, 3)),
    # Of 64x64 in steps of 32, dx of a packed batch spilled 8 bytes on sm_100.
    "tf32": ((128, 128, 32, 8, 4), (64, 64, 64, 8, 2), (32, 64, 32, 4, 4)),
    # Eight warps would let 64x64 have two accumulators, which spilled 8 bytes on sm_100.
    "ieee": ((64, 64, 16, 4, 3), (32, 64, 32, 4, 3)),
}
_RESERVE = 2 * 1024  # barriers and the epilogue's scratch beside the stages
FILL = 900  # cycles before a tile's first product: launch, first loads; assumed
_REFILL = 500  # of them where a persistent program only waits for the loads; assumed
_WIDE_EFFICIENCY = {256: 1.0, 128: 0.9, 64: 0.75, 32: 0.5}  # of the tensor cores' rate, by accumulator width
_PER_MULTIPROCESSOR_REGISTERS = 65536
_SPLITS = (1, 2, 3, 4, 6, 8)
_LONGEST_EDGE = 1 << 10  # rows; no tile has more
CACHE_SIZE = 4096  # shapes and layouts that the caches below and in runtime/ hold
_SPLIT_MARGIN = 1.05  # split-K must promise this much: the model is no better, and costs a launch


def loading(chip: Chip, dtype: torch.dtype, precision: str, descriptors: bool) -> str:
    """How tiles come in: "descriptors" through TMA, "pointers" in vectors, "elements" one by one; float32's in vectors by its precision.

    IEEE's, which no matrix instruction multiplies, are one kind: small either way.
    """
    if dtype == torch.float32 and (descriptors or precision == "ieee"):
        return precision
    if not descriptors:
        return "elements"
    return "descriptors" if chip.architecture >= 90 else "pointers"


def _accumulator_limit(kind: str) -> int:
    """Float32 accumulators a thread may hold without spilling, as the compiled kernels show."""
    return {"descriptors": 128, "pointers": 64, "elements": 32, "tf32": 64, "ieee": 32}[kind]


def candidates(
    chip: Chip, dtype: torch.dtype, precision: str, *, descriptors: bool, accumulators: int = 1, halves: int = 1
) -> Iterator[Tile]:
    """Every tile that fits, widest first.

    Args:
        descriptors: every operand can have one (`tma.supports_tma`), also on a chip without TMA, which then loads vectors.
        accumulators: full-width accumulators alive at once.
        halves: 2 where a tile's columns are two operands side by side (gate and key).
    """
    kind = loading(chip, dtype, precision, descriptors)
    for block_n, wide, block_k, warps, most in _SHAPES[kind]:
        if kind == "elements" and chip.family == "tcgen05" and block_n == 64:
            continue  # a gated hidden tile of them spilled 8 bytes with Triton 3.6
        if kind == "ieee" and not descriptors:
            block_k = 16  # two accumulators of 32x64 in steps of 32 spilled 40 bytes on sm_100
        stage = (block_n + wide) * block_k * dtype.itemsize
        stages = min(most, (chip.shared_memory - _RESERVE) // stage)
        registers = accumulators * block_n * wide // (32 * warps)
        if stages >= 2 and registers <= _accumulator_limit(kind):
            yield Tile(block_n, wide // halves, block_k, warps, stages)


def straddles(sequences: int, length: int | None, block_n: int) -> bool:
    """Whether a row tile may hold rows of two sequences, or of none; length None: packed."""
    return length is None or (sequences > 1 and length % block_n != 0)


@lru_cache(CACHE_SIZE)
def hidden_tile(chip: Chip, shape: Shape) -> Tile:
    """The hidden kernel's tile."""
    return _hidden_tile(chip, _bucketed(shape, None))


@cache
def _hidden_tile(chip: Chip, shape: Shape) -> Tile:
    fitting = candidates(chip, shape.dtype, shape.precision, descriptors=shape.descriptors, halves=shape.branches)
    return min(fitting, key=lambda tile: hidden_cycles(chip, tile, shape))


def hidden_cycles(chip: Chip, tile: Tile, shape: Shape, persistent: bool = False) -> float:
    """Predicted clock cycles of one hidden launch; `persistent`: where `is_persistent` allows it."""
    rows, width, pairs, slots, sequences = shape.rows, shape.width, shape.pairs, shape.slots, shape.sequences
    wide = tile.columns * shape.branches
    row_tiles = math.ceil(rows / tile.block_n)
    memory = (
        (row_tiles + min(sequences, rows)) * math.ceil(slots / wide)
        if sequences > 1
        else row_tiles * math.ceil(slots / wide)
    )
    count = row_tiles * math.ceil(pairs / tile.columns) + memory
    numbers = rows * width + pairs * width * shape.branches + sequences * slots * width + rows * (pairs + slots)
    moved = numbers * shape.dtype.itemsize
    cycles = _cycles(chip, tile, shape.dtype, shape.precision, wide, count, math.ceil(width / tile.block_k), moved)
    if persistent and is_persistent(chip, tile, shape.dtype, wide, count):
        between = (math.ceil(count / chip.multiprocessors) - 1) * (FILL - _REFILL)
        cycles = max(cycles - between, moved / chip.memory)
    return cycles


def is_persistent(chip: Chip, tile: Tile, dtype: torch.dtype, wide: int, count: int) -> bool:
    """Whether `count` tiles of `wide` accumulated columns take a persistent kernel: one tile fills a multiprocessor, and waves are several.

    Smaller tiles have neighbours on the multiprocessor that work while one begins or ends.
    """
    staged = 2 * tile.block_n * epilogue_columns(chip, dtype) * dtype.itemsize
    stages = tile.stages * (tile.block_n + wide) * tile.block_k * dtype.itemsize
    alone = 2 * stages > chip.shared_memory
    return (
        chip.family == "wgmma"
        and alone
        and stages + staged + _RESERVE <= chip.shared_memory
        and count > chip.multiprocessors
    )


def epilogue_columns(chip: Chip, dtype: torch.dtype) -> int:
    """Columns that the hidden kernel's epilogue works on, and stores through shared memory, at a time."""
    # Of 64 columns sm_100 spilled 104 bytes with Triton 3.9.
    return (32 if chip.family == "tcgen05" else 64) * 2 // dtype.itemsize


@lru_cache(CACHE_SIZE)
def output_tile(chip: Chip, shape: Shape) -> Tile:
    """The output kernel's tile."""
    # Which tiles straddle two sequences depends on the largest power of two in T alone.
    length = shape.length
    even = length if length is None else min(length & -length, _LONGEST_EDGE) if shape.sequences > 1 else _LONGEST_EDGE
    return _output_tile(chip, _bucketed(shape, even))


@cache
def _output_tile(chip: Chip, shape: Shape) -> Tile:
    kind = (chip, shape.dtype, shape.precision)
    single = list(candidates(*kind, descriptors=shape.descriptors))
    double = set(candidates(*kind, descriptors=shape.descriptors, accumulators=2))
    found: list[tuple[float, int, Tile]] = []
    for order, tile in enumerate(single):
        straddling = shape.slots > 0 and (not shape.length or shape.length % tile.block_n != 0)
        if straddling and tile not in double:
            continue
        for splits in split_choices(chip, tile, shape.rows, shape.width, shape.pairs):
            tile = replace(tile, splits=splits)
            cycles = output_cycles(chip, tile, shape, straddling)
            found.append((cycles * (_SPLIT_MARGIN if splits > 1 else 1.0), order, tile))
    return min(found, key=lambda f: f[:2])[2]


def split_choices(chip: Chip, tile: Tile, rows: int, columns: int, depth: int) -> tuple[int, ...]:
    """How many splits a loop of `depth` may have: one, unless tiles are fewer than multiprocessors; none under four steps."""
    count = math.ceil(rows / tile.block_n) * math.ceil(columns / tile.columns)
    most = depth // (4 * tile.block_k) if count < chip.multiprocessors else 1
    return tuple(s for s in _SPLITS if s <= max(most, 1))


def output_cycles(chip: Chip, tile: Tile, shape: Shape, straddling: bool) -> float:
    """Predicted clock cycles of one output launch; `straddling`: sequences end inside row tiles."""
    rows, width, pairs, slots, sequences = shape.rows, shape.width, shape.pairs, shape.slots, shape.sequences
    row_tiles = math.ceil(rows / tile.block_n)
    touched = 1 + (min(sequences, rows) - 1) / row_tiles if straddling else 1.0
    depth = tile.block_k * tile.splits
    steps = math.ceil(pairs / depth) + touched * math.ceil(slots / depth)
    count = row_tiles * math.ceil(width / tile.columns) * tile.splits
    moved = (rows * (pairs + slots) + pairs * width + sequences * slots * width + rows * width) * shape.dtype.itemsize
    cycles = _cycles(chip, tile, shape.dtype, shape.precision, tile.columns, count, steps, moved)
    return cycles + reduce_cycles(chip, rows * width, tile.splits)


def reduce_cycles(chip: Chip, numbers: int, splits: int) -> float:
    """Cycles to store the partial sums of a result in float32 and to add them in a second launch; L2 holds what is so small."""
    if splits == 1:
        return 0.0
    return 4 * numbers * (2 * splits + 1) / (chip.l2 * chip.multiprocessors) + chip.cycles(
        RATES.launch_pdl if chip.has_pdl else RATES.launch
    )


def _cycles(
    chip: Chip, tile: Tile, dtype: torch.dtype, precision: str, wide: int, count: int, steps: float, moved: int
) -> float:
    step = step_cycles(chip, tile, dtype, precision, wide)
    shared = tile.stages * (tile.block_n + wide) * tile.block_k * dtype.itemsize + _RESERVE
    registers = (tile.block_n * wide // (32 * tile.warps) + 64) * 32 * tile.warps
    resident = max(1, min(chip.shared_memory // shared, _PER_MULTIPROCESSOR_REGISTERS // registers, 4))
    waves = math.ceil(count / (chip.multiprocessors * resident))
    store = tile.block_n * wide * dtype.itemsize / chip.l2
    return max(waves * (FILL + store + resident * steps * step), moved / chip.memory)


def wide_efficiency(wide: int) -> float:
    """The share of the tensor cores' rate that an accumulator of so many columns lets them reach: each of its operands is read more often."""
    below = max((w for w in _WIDE_EFFICIENCY if w <= wide), default=min(_WIDE_EFFICIENCY))
    above = min((w for w in _WIDE_EFFICIENCY if w >= wide), default=max(_WIDE_EFFICIENCY))
    low, high = _WIDE_EFFICIENCY[below], _WIDE_EFFICIENCY[above]
    return low if above == below else low + (high - low) * (wide - below) / (above - below)


def step_cycles(chip: Chip, tile: Tile, dtype: torch.dtype, precision: str, wide: int) -> float:
    """Predicted clock cycles of one step of a tile's K loop, `wide` accumulated columns: bound by the products or by L2."""
    flops = 2 * tile.block_n * wide * tile.block_k
    if dtype != torch.float32:
        rate = chip.tensor * wide_efficiency(wide)
    else:
        rate = chip.tensor / 2 * wide_efficiency(wide) if precision == "tf32" else chip.cuda
    delivered = (tile.block_n + wide) * tile.block_k * dtype.itemsize / chip.l2
    return max(flops / rate, delivered)


@lru_cache(CACHE_SIZE)
def core_tile(
    chip: Chip, dtype: torch.dtype, precision: str, *, rows: int, rank: int, given_scores: bool = False
) -> Tile:
    """The core kernel's tile: `columns` of u at once, steps of `block_k` slots; few rows take short tiles, for more programs.

    Args:
        given_scores: it begins with scores that are kept.
    """
    odd = rank % 8 != 0  # then a core is loaded element by element, each with its own address
    columns = min(64 if odd or dtype == torch.float32 else 256, _bucket(rank))
    if dtype == torch.float32 and precision == "ieee":
        return Tile(16, min(columns, 32) if odd else columns, 16, 4, 2)  # 64 odd ones spilled 8 bytes on sm_80
    if dtype == torch.float32:
        return Tile(32, columns, 32, 4, 2)
    block_n = 64 if _bucket(rows) >= 64 * chip.multiprocessors // 2 else 32 if rows > 256 else 16
    # With dropout and a threshold, steps of 64 kept scores spilled 8 bytes on sm_100, and 16 on sm_90 in tiles of 32 rows.
    short = odd or given_scores
    return Tile(block_n, columns, 32 if short else 64, 8 if block_n == 64 else 4, 2)


def _bucketed(shape: Shape, length: int | None) -> Shape:
    """What of a shape a tile depends on: rows and sequences in powers of two."""
    # One sequence, as a memory that all rows share looks to the kernels, is its own bucket.
    sequences = _bucket(shape.sequences) if shape.sequences > 1 else shape.sequences
    return shape._replace(rows=_bucket(shape.rows), sequences=sequences, length=length, dense=False)


def _bucket(count: int) -> int:
    """The next power of two, 16 at least."""
    return max(16, 1 << max(count - 1, 0).bit_length())
