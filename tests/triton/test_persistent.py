"""The persistent hidden kernel, and its stores through shared memory: the same bits as with one program per tile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from memvp_kernels import fused_ffn
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.kernels import hidden
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.hardware import chip_of
from tests import tolerance
from tests.triton.test_backward import DEVICE, example

run = functools.partial(fused_ffn, backend="triton")
HOPPER = chip_of(90)


@pytest.fixture(params=[1, 3])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A chip of so few multiprocessors, on which every hidden kernel is persistent; tiles of two subtiles."""
    chip = chip_of(90, int(request.param))
    monkeypatch.setattr(launch, "chip", lambda device: chip)
    monkeypatch.setattr(tiles, "is_persistent", lambda *_: True)
    monkeypatch.setattr(tiles, "epilogue_columns", lambda *_: 16)
    monkeypatch.setattr(tiles, "hidden_tile", lambda *_: Tile(32, 32, 16, 4, 2, group=2))
    return int(request.param)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_output_and_every_gradient(form: str, gated: bool, programs: int) -> None:
    """The factored form is persistent and stores by TMA; the plain one's visual tiles leave no registers for either."""
    a = example(torch.bfloat16, lengths=[37] * 2, M=17, form=form, F=72, gated=gated, biased=True)
    tolerance.check(run, dict(a, activation="gelu"))


def test_the_same_bits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = example(torch.bfloat16, lengths=[45], M=19, form="factored", d=40, F=88, R=1)
    grad = torch.randn(a["x"].shape, generator=torch.Generator().manual_seed(3)).to(a["x"])
    names = ["x", "visual_key", "visual_value"]
    y, grads = tolerance.gradients(lambda **b: run(**b), a, names, grad)
    monkeypatch.setattr(tiles, "is_persistent", lambda *_: False)
    expected, wanted = tolerance.gradients(lambda **b: run(**b), a, names, grad)
    assert torch.equal(y, expected)
    assert all(torch.equal(grads[n], wanted[n]) for n in names)


def test_what_is_launched(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[Any] = []
    known = hidden.hidden_fwd_kernel

    class Recorded:
        def __getitem__(self, grid: Any) -> Any:
            def launched(*arguments: Any, **constants: Any) -> Any:
                grids.append((grid[0], constants["PERSISTENT"], constants["STORE"]))
                return known[grid](*arguments, **constants)

            return launched

    monkeypatch.setattr(hidden, "hidden_fwd_kernel", Recorded())
    with torch.no_grad():
        run(**example(torch.bfloat16, lengths=[37] * 2, M=17, form="factored"))
        run(**example(torch.bfloat16, lengths=[37] * 2, M=17, form="plain"))
        run(**example(torch.float32, lengths=[37] * 2, M=17, form="factored"))
    assert grids[0] == (programs, True, 1)
    assert grids[1][0] > programs
    assert grids[1][1:] == grids[2][1:] == (False, 0)
    assert DEVICE.type in ("cpu", "cuda")


def test_which_tiles_are_persistent() -> None:
    """One that fills a multiprocessor of Hopper, with room for its stores, in more than one wave."""
    bf16 = torch.bfloat16
    widest, *_, smallest = tiles.candidates(HOPPER, bf16, "ieee", descriptors=True)
    assert tiles.is_persistent(HOPPER, widest, bf16, 256, 133)
    assert not tiles.is_persistent(HOPPER, widest, bf16, 256, 132)
    assert not tiles.is_persistent(HOPPER, widest, torch.float32, 256, 1000)
    assert not tiles.is_persistent(chip_of(80), Tile(128, 128, 32, 8, 4), bf16, 128, 1000)
    assert not tiles.is_persistent(HOPPER, Tile(64, 32, 128, 4, 4), bf16, 32, 1000)
    assert smallest.columns == 32
