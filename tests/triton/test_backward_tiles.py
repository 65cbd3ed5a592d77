"""The backward's share of the cost model: whatever it returns fits the chip, and sums over all rows are split where that fills the chip."""

from __future__ import annotations

import itertools

import pytest
import torch

from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.hardware import chip_of

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
KINDS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "precision"), KINDS, ids=str)
@pytest.mark.parametrize("descriptors", [True, False])
def test_everything_it_returns_fits(architecture: int, dtype: torch.dtype, precision: str, descriptors: bool) -> None:
    chip = chip_of(architecture)
    common = {"descriptors": descriptors}
    for rows, width in itertools.product((1, 17, 512, 8192, 10**6), (1, 37, 136, 4096)):
        shape = Shape(dtype, precision, rows, width, 11008, 320, 4, 511, gated=False, descriptors=descriptors)
        found = [
            backward_tiles.dhidden_tile(chip, shape),
            backward_tiles.dinput_tile(chip, shape),
            backward_tiles.dmemory_tile(chip, dtype, precision, width=width, **common),
            backward_tiles.dmemory_tile(chip, dtype, precision, width=width, together=True, **common),
        ]
        for tile in found:
            assert tile.stages * (tile.block_n + tile.columns) * tile.block_k * dtype.itemsize <= chip.shared_memory
            assert tile.block_n * tile.columns // (32 * tile.warps) <= 128
            assert tile.stages >= 2
            assert all(n & (n - 1) == 0 for n in (tile.block_n, tile.columns, tile.block_k, tile.warps))
        core = backward_tiles.core_backward_tile(chip, dtype, precision, rows=rows, rank=width)
        # Two accumulators of `columns`, and dvisual beside them.
        assert core.block_n * (2 * core.columns + core.block_k) // (32 * core.warps) <= 160


def test_rows_count_only_by_bucket() -> None:
    chip = chip_of(90)

    def shape(rows: int) -> Shape:
        return Shape(
            torch.bfloat16, "ieee", rows, 4096, 11008, 320, rows // 512 + 1, 512, gated=False, descriptors=True
        )

    found = {
        (
            backward_tiles.dhidden_tile(chip, shape(rows)),
            backward_tiles.core_backward_tile(chip, torch.bfloat16, "ieee", rows=rows, rank=136),
        )
        for rows in range(1, 8193, 13)
    }
    assert len(found) <= 8


def test_rows_are_split_where_a_sum_has_too_few_tiles() -> None:
    """The positions of LLaMA-7B are 160 tiles, 1.2 waves of an H100: whole, the second wave would be a fifth full."""
    assert backward_tiles.row_splits(132, 160, 128) > 1
    assert backward_tiles.row_splits(132, 10_000, 128) == 1
    assert backward_tiles.row_splits(132, 1, 1) == 1
    for outputs, steps in itertools.product((1, 20, 256, 512), (1, 2, 16, 128)):
        assert backward_tiles.row_splits(132, outputs, steps) <= steps
