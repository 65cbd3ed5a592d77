"""The cost model: whatever it returns fits the chip, it asks only for buckets of the batch, and it prefers what waves and bytes prefer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.hardware import Chip, chip_of

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KINDS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
LLAMA = {"width": 4096, "pairs": 11008, "slots": 320}


def shape(dtype: torch.dtype, precision: str, rows: int, aligned: bool, *, gated: bool, **given: int) -> Shape:
    """Sequences of 512 through LLaMA-7B's FFN, but for what is given."""
    sizes: dict[str, Any] = {**LLAMA, "sequences": max(rows // 512, 1), "length": 512, **given}
    return Shape(dtype, precision, rows, gated=gated, descriptors=aligned, **sizes)


def tile_of(
    choose: Callable[[Chip, Shape], Tile],
    chip: Chip,
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    aligned: bool = True,
    **given: int,
) -> Tile:
    return choose(chip, shape(dtype, precision, rows, aligned, gated=choose is tiles.hidden_tile, **given))


hidden, output, dhidden, dinput = (
    functools.partial(tile_of, choose)
    for choose in (tiles.hidden_tile, tiles.output_tile, backward_tiles.dhidden_tile, backward_tiles.dinput_tile)
)


def core_backward(chip: Chip, rows: int) -> Tile:
    return backward_tiles.core_backward_tile(chip, torch.bfloat16, "ieee", rows=rows, rank=136)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_everything_it_returns_fits(architecture: int, dtype: torch.dtype, precision: str, aligned: bool) -> None:
    chip, kind = chip_of(architecture), (dtype, precision, aligned)
    for rows, width, pairs, slots in itertools.product((1, 17, 512, 8192, 10**6), (1, 37, 4096), (1, 11008), (0, 320)):
        sizes = {"width": width, "pairs": pairs, "slots": slots}
        memory = functools.partial(
            backward_tiles.dmemory_tile, chip, dtype, precision, width=width, descriptors=aligned
        )
        first = hidden(chip, rows, *kind, **sizes)
        others = [choose(chip, rows, *kind, **sizes) for choose in (output, dhidden, dinput)]
        found = [
            (first, 2 * first.columns, 1),
            *((t, t.columns, 1) for t in (*others, memory(), memory(together=True))),
        ]
        if slots:
            straddling = output(chip, rows, *kind, **sizes, length=511, sequences=4)
            found.append((straddling, straddling.columns, 2))
        for tile, wide, accumulators in found:
            assert tile.stages * (tile.block_n + wide) * tile.block_k * dtype.itemsize <= chip.shared_memory
            assert accumulators * tile.block_n * wide // (32 * tile.warps) <= 128
            assert tile.stages >= 2
            assert all(n & (n - 1) == 0 for n in (tile.block_n, tile.columns, tile.block_k, tile.warps))
        core = tiles.core_tile(chip, dtype, precision, rows=rows, rank=136)
        assert core.block_n * (core.columns + core.block_k) // (32 * core.warps) <= 128
        core = backward_tiles.core_backward_tile(chip, dtype, precision, rows=rows, rank=width)
        # Two accumulators of `columns`, and dvisual beside them.
        assert core.block_n * (2 * core.columns + core.block_k) // (32 * core.warps) <= 160


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_and_sequences_count_only_by_bucket(architecture: int) -> None:
    """A model that sees every length compiles few kernels, and neighbours in a bucket share theirs."""
    chip = chip_of(architecture)
    assert hidden(chip, 2049) == hidden(chip, 4096)
    for one, other in ((hidden, output), (dhidden, core_backward)):
        assert len({(one(chip, rows), other(chip, rows)) for rows in range(1, 8193, 13)}) <= 8
    lengths = {output(chip, 16 * length, sequences=16, length=length) for length in range(1, 513)}
    assert len(lengths) <= 6


def test_hopper_takes_the_widest_tile_for_training() -> None:
    chip = chip_of(90)
    assert hidden(chip, 8192) == Tile(128, 128, 64, 8, 4)
    assert output(chip, 8192) == Tile(128, 256, 64, 8, 4)


def test_few_rows_take_more_and_smaller_tiles() -> None:
    """At 512 rows the down-projection has 64 tiles of 128x256 for 132 multiprocessors: half the chip would wait."""
    chip = chip_of(90)
    tile = output(chip, 512)
    assert (512 // tile.block_n) * (4096 // tile.columns) >= 128
    assert output(chip, 64).columns <= 64


@pytest.mark.parametrize(
    ("sequences", "length", "expected"),
    [(4, 512, False), (4, 500, True), (1, 500, False), (1, None, True), (9, None, True)],
)
def test_which_tiles_a_sequence_may_end_in(sequences: int, length: int | None, expected: bool) -> None:
    assert tiles.straddles(sequences, length, 128) == expected


def test_an_unknown_chip_counts_as_the_one_before() -> None:
    assert chip_of(94).architecture == 90
    assert chip_of(75).architecture == 80
    assert chip_of(90, 78).multiprocessors == 78


def test_rows_are_split_where_a_sum_has_too_few_tiles() -> None:
    """The positions of LLaMA-7B are 160 tiles, 1.2 waves of an H100: whole, the second wave would be a fifth full."""
    assert backward_tiles.row_splits(132, 160, 128) > 1
    assert backward_tiles.row_splits(132, 10_000, 128) == 1
    assert backward_tiles.row_splits(132, 1, 1) == 1
    for outputs, steps in itertools.product((1, 20, 256, 512), (1, 2, 16, 128)):
        assert backward_tiles.row_splits(132, outputs, steps) <= steps
