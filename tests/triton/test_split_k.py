"""Split-K: the output and dx kernels with few tiles, the sum of the partials, and when the cost model asks for it."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import fused_ffn
from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.kernels.split_k import empty_splits, reduce_splits
from memvp_kernels.hardware import chip_of
from tests import tolerance
from tests.triton.test_backward import DEVICE, example

run = functools.partial(fused_ffn, backend="triton")


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.slow), 3])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every output and dx kernel with so many splits, of steps that do not divide F or M."""
    count = int(request.param)
    monkeypatch.setattr(tiles, "output_tile", lambda *_: Tile(32, 32, 16, 4, 2, group=2, splits=count))
    monkeypatch.setattr(backward_tiles, "dinput_tile", lambda *_: Tile(32, 64, 32, 4, 2, group=2, splits=count))
    return count


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_output_and_every_gradient(form: str, packed: bool, splits: int, operands: str) -> None:
    lengths = [11, 1, 0, 27] if packed else [13] * 3
    a = example(torch.bfloat16, lengths=lengths, M=19, form=form, packed=packed, d=45, F=71, biased=True)
    a["residual"] = torch.randn(a["x"].shape, device=DEVICE).to(torch.bfloat16)
    tolerance.check(run, a)
    assert torch.equal(run(**a), run(**a))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, splits: int) -> None:
    tolerance.check(run, example(dtype, lengths=[37, 37], M=19, form="plain"))


def test_fewer_steps_than_splits(splits: int) -> None:
    """F and M within one step: the other splits add zeros."""
    tolerance.check(run, example(torch.bfloat16, lengths=[9], M=1, form="plain", F=8))


def test_partial_sums_are_added_in_order_and_in_float32() -> None:
    partials = empty_splits(3, torch.empty(5, 300, dtype=torch.bfloat16, device=DEVICE))
    assert partials is not None
    assert partials.dtype == torch.float32
    assert empty_splits(1, partials) is None
    partials.copy_(torch.randn(partials.shape, generator=torch.Generator().manual_seed(2)))
    bias, residual = torch.randn(600, device=DEVICE)[::2], torch.randn(300, 5, device=DEVICE).T
    out = torch.empty(5, 300, dtype=torch.bfloat16, device=DEVICE)
    expected = ((((partials[0] + partials[1]) + partials[2]) + bias) + residual).bfloat16()
    assert torch.equal(reduce_splits(partials, bias, residual, out), expected)


def chosen(rows: int, *, width: int = 2048, pairs: int = 5632) -> Tile:
    return tiles.output_tile(chip_of(90), shape(rows, width, pairs, 320))


def shape(rows: int, width: int, pairs: int, slots: int) -> Shape:
    """Of one sequence."""
    return Shape(torch.bfloat16, "ieee", rows, width, pairs, slots, 1, rows, gated=False, descriptors=True)


def test_only_thin_waves_are_split() -> None:
    """d = 2048 has 32 tiles of 128x256 at 512 rows, for 132 multiprocessors; at 8192 rows they are 512."""
    assert chosen(512).splits > 1
    assert chosen(8192).splits == 1
    for rows in (16, 64, 128, 256, 512, 1024, 2048, 8192):
        tile = chosen(rows)
        whole = -(-rows // tile.block_n) * -(-2048 // tile.columns)
        assert tile.splits == 1 or whole < 132
        assert 5632 // tile.block_k // tile.splits >= 4
