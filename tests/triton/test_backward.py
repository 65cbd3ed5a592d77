"""The kernels on tiles smaller than the problem: output and every gradient by the 2x rule, in every sharing of the memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn, philox
from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.kernels import dhidden, dmemory
from tests import cases, tolerance
from tests.cases import DEVICE

run = functools.partial(fused_ffn, backend="triton")
pytestmark = [
    pytest.mark.device,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, several subtiles of columns and several parts of a sum from few numbers."""
    monkeypatch.setattr(tiles, "hidden_tile", lambda _, shape: Tile(32, 32 // shape.branches, 16, 4, 2, group=2))
    monkeypatch.setattr(tiles, "output_tile", lambda *_: Tile(32, 32, 16, 4, 2, group=2))
    monkeypatch.setattr(tiles, "core_tile", lambda *_, **__: Tile(32, 16, 16, 4, 2))
    monkeypatch.setattr(backward_tiles, "dhidden_tile", lambda *_: Tile(32, 64, 32, 4, 2, group=2))
    monkeypatch.setattr(backward_tiles, "dinput_tile", lambda *_: Tile(32, 32, 64, 4, 2, group=2))
    monkeypatch.setattr(backward_tiles, "dmemory_tile", lambda *_, **__: Tile(16, 32, 32, 4, 2))
    monkeypatch.setattr(backward_tiles, "core_backward_tile", lambda *_, **__: Tile(32, 16, 16, 4, 2))
    monkeypatch.setattr(backward_tiles, "row_splits", lambda *_: 3)
    monkeypatch.setattr(dhidden, "_SUBTILE", 16)
    monkeypatch.setattr(dmemory, "_SCAN", 4)


def example(
    dtype: torch.dtype,
    *,
    lengths: list[int],
    M: int,
    form: str,
    R: int | None = None,
    d: int = 40,
    F: int = 72,
    packed: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Sequences of these lengths over R memory rows (default: one each); `form` is plain or factored."""
    a = cases.ffn(dtype, S=len(lengths), T=lengths[0], d=d, F=F, **options)
    a = cases.memory(a, R=len(lengths) if R is None else R, M=M, r=24 if form == "factored" else None)
    if packed:
        a = cases.packed(a, lengths)
    return cases.moved(a)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def results(a: Mapping[str, Any], names: list[str] | None = None, grad: Tensor | None = None) -> dict[str, Tensor]:
    """y, and the gradients of `names` (default: all there are), through the public function."""
    names = tolerance.floating(a) if names is None else names
    return dict(zip(("y", *names), tolerance.results(run, a, names, grad), strict=True))


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_tiles_that_straddle_sequences(form: str, packed: bool, operands: str) -> None:
    lengths = [11, 1, 0, 5, 27] if packed else [11] * 4
    tolerance.check(run, example(torch.bfloat16, lengths=lengths, M=17, form=form, packed=packed))


SIZES: dict[str, dict[str, Any]] = {
    "inside one sequence": {"dtype": torch.bfloat16, "lengths": [64, 64], "M": 40},
    "float16": {"dtype": torch.float16, "lengths": [64, 64], "M": 40},
    "float32": {"dtype": torch.float32, "lengths": [37, 37], "M": 19},
    "odd": {"dtype": torch.bfloat16, "lengths": [37] * 3, "M": 19, "d": 45, "F": 71},
    "one slot": {"dtype": torch.bfloat16, "lengths": [9, 9], "M": 1},
}


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(form: str, sizes: str) -> None:
    tolerance.check(run, example(**SIZES[sizes], form=form))


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_the_papers_320_slots(form: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "hidden_tile", lambda *_: Tile(32, 64, 64, 4, 2))
    monkeypatch.setattr(tiles, "output_tile", lambda *_: Tile(32, 64, 128, 4, 2))
    monkeypatch.setattr(tiles, "core_tile", lambda *_, **__: Tile(32, 32, 128, 4, 2))
    monkeypatch.setattr(backward_tiles, "dhidden_tile", lambda *_: Tile(32, 128, 64, 4, 2))
    monkeypatch.setattr(dhidden, "_SUBTILE", 64)
    monkeypatch.setattr(backward_tiles, "core_backward_tile", lambda *_, **__: Tile(32, 32, 64, 4, 2))
    monkeypatch.setattr(backward_tiles, "dmemory_tile", lambda *_, **__: Tile(64, 64, 16, 4, 2))
    lengths = [11, 1, 0, 33] if packed else [13] * 2
    tolerance.check(run, example(torch.bfloat16, lengths=lengths, M=320, form=form, packed=packed))


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_rows_of_memory_shared_unread_and_absent(form: str, packed: bool) -> None:
    """Sums over runs of sequences that read a row, in blocks of the index; exact zeros where nobody reads and past the lengths."""
    lengths = [7, 0, 12, 3, 5, 1] if packed else [7] * 6
    a = example(torch.bfloat16, lengths=lengths, M=17, R=4, form=form, packed=packed)
    a["visual_index"] = integers(2, 2, -1, 2, 0, 0)
    a["visual_lengths"] = integers(17, 17, 5, 17)
    tolerance.check(run, a)
    found = results(a)
    for name in ("visual_key", "visual_value"):
        assert not found[name][[1, 3]].any(), f"{name}: rows that nobody reads"
        assert not found[name][2, 5:].any(), f"{name}: slots past the length"
        assert found[name][0].any()
        assert found[name][2, :5].any()
    # Between two runs of readers, in more than one part of the rows: neither moves a bit of what the readers share.
    shared = [n for n in ("visual_basis", "key_position", "value_position") if n in a]
    idle = slice(7, 19) if packed else 2
    dirty, grad = a["x"].clone(), tolerance.some_gradient(a["x"])
    dirty[idle], grad[idle] = float("nan"), float("inf")
    again = results(dict(a, x=dirty), shared, grad)
    assert all(torch.equal(again[n], found[n]) for n in shared)


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_the_image_of_one_sequence_stays_out_of_the_others(form: str, operands: str) -> None:
    """NaN in a memory row, in a sequence's x or in its dy reaches what is that sequence's and no other image's, nor past the lengths."""
    a = example(torch.float32, lengths=[11, 9, 0, 5], M=9, form=form, F=16, packed=True)
    a["visual_lengths"] = integers(9, 3, 9, 0)
    names = ["x", "visual_key", "visual_value"]
    clean = results(a, names)
    for name in ("visual_key", "visual_value"):
        dirty = a[name].clone()
        for row, slots in enumerate(a["visual_lengths"].tolist()):
            dirty[row, slots:] = float("nan")
        found = results(dict(a, **{name: dirty}), names)
        assert all(torch.equal(found[n], clean[n]) for n in clean), f"{name} past the lengths"
        dirty = a[name].clone()
        dirty[1, 1:3] = torch.tensor([[float("nan")], [float("inf")]])
        found = results(dict(a, **{name: dirty}), names)
        for n in ("y", "x"):
            assert found[n][11:20].isnan().all()
            assert torch.equal(found[n][:11], clean[n][:11])
            assert torch.equal(found[n][20:], clean[n][20:])
    dirty_x, grad = a["x"].clone(), tolerance.some_gradient(a["x"])
    dirty_x[12] = grad[13] = float("nan")
    found = results(dict(a, x=dirty_x), names, grad)
    for name in ("visual_key", "visual_value"):
        assert found[name][1, :3].isnan().any()
        assert not found[name][1, 3:].any()
        assert not found[name][[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_the_visual_branch_alone_and_weights_of_any_layout(form: str, gated: bool) -> None:
    a = example(torch.bfloat16, lengths=[11] * 3, M=17, form=form, alone=True)
    tolerance.check(run, a)
    b = example(torch.bfloat16, lengths=[11] * 3, M=17, form=form, gated=gated, transposed=not gated, biased=True)
    b["key"] = b["key"].T.contiguous().T
    tolerance.check(run, dict(b, activation="gelu_tanh", visual_activation="relu", visual_scale=0.3))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_a_wider_memory_gets_wider_gradients(form: str) -> None:
    """float32 memory under bfloat16: gradients in float32 that were never rounded to bfloat16, positions summed in float32."""
    a = example(torch.bfloat16, lengths=[24] * 3, M=9, form=form)
    for name in ("visual_key", "visual_value", "visual_basis", "key_position", "value_position"):
        if name in a:
            a[name] = a[name].float()
    tolerance.check(run, a)
    found = results(a)
    for name in ("visual_key", "key_position", "value_position"):
        assert found[name].dtype == torch.float32
        assert (found[name].bfloat16().float() != found[name]).float().mean() > 0.9, name
    if form == "plain":
        torch.testing.assert_close(found["value_position"], found["visual_value"].sum(0))


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_dropout_is_drawn_again_exactly(form: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [11, 1, 0, 27] if packed else [11] * 4
    a = dict(example(torch.bfloat16, lengths=lengths, M=17, form=form, packed=packed), dropout_p=0.4)
    seed = torch.tensor([0x7EDC_BA98_7654_3210], device=DEVICE)
    monkeypatch.setattr("memvp_kernels.autograd.draw_seed", lambda device: seed)
    rows = a["x"].shape[:-1].numel()
    tolerance.check(run, a, keep=philox.keep_mask(seed, rows, 17, 0.4))
