"""Scores under a feature map and the drop of each row's lowest ones, in Triton: the order statistic alone, and both passes by the 2x rule."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import fused_ffn, philox
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.gemm import override_implementation
from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.kernels import drop
from memvp_kernels.backends.triton.kernels.drop import dropped_visual, thresholds
from memvp_kernels.problem import Segments
from tests import cases, relatives, stack, tolerance
from tests.cases import DEVICE

run = functools.partial(fused_ffn, backend="triton")
pytestmark = [pytest.mark.device, pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "slots", "most", "gamma"),
    [
        (torch.bfloat16, 1, 1024, 0.7),
        (torch.bfloat16, 320, 1024, 0.29),
        (torch.float32, 37, 1024, 0.7),
        (torch.float16, 40, 32, 0.7),
    ],
)
def test_the_order_statistic(
    dtype: torch.dtype, slots: int, most: int, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block or several, whatever the sign and size, ties included; padding is never counted."""
    monkeypatch.setattr(drop, "_MOST_SLOTS", most)
    half, most_of_them = (
        max(slots // 2, 1),
        max(3 * slots // 4, 1),
    )  # of 40 slots 20 and 30: 0.7 of them is 14 and 21 to Python
    segments = Segments(
        rows=37, sequences=5, length=None, cu_seqlens=torch.tensor([0, 11, 11, 20, 30, 35], dtype=torch.int32, device=DEVICE),
        index=torch.tensor([2, 0, 1, -1, 2], dtype=torch.int32, device=DEVICE),
        lengths=torch.tensor([slots, half, most_of_them], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    scores = (torch.randn(37, slots) * 10 ** torch.randint(-6, 4, (37, slots))).to(dtype).to(DEVICE)
    scores[:5] = scores[:5].round()
    scores[5, : slots // 2] = -0.0
    reads = dict.fromkeys((*range(11), *range(30, 35)), most_of_them) | dict.fromkeys(range(11, 20), half)
    theta = thresholds(scores, segments, 3, gamma)
    visual = dropped_visual(scores, segments, 3, gamma, Visual("identity", 1.0, None, 0))
    for row, valid in reads.items():
        expected = scores[row, :valid].sort().values[int(gamma * valid)]
        assert theta[row] == expected.float(), row
        kept = torch.where(scores[row] >= expected, scores[row], 0)
        kept[valid:] = 0
        assert torch.equal(visual[row], kept)
    assert visual[20:30].abs().sum() == 0
    assert visual[35:].abs().sum() == 0


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "hidden_tile", lambda _, shape: Tile(16, 32 // shape.branches, 16, 4, 2))
    monkeypatch.setattr(tiles, "output_tile", lambda *_: Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(tiles, "core_tile", lambda *_, **__: Tile(16, 16, 16, 4, 2))
    monkeypatch.setattr(backward_tiles, "core_backward_tile", lambda *_, **__: Tile(16, 16, 16, 4, 2))


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("packed_index_lengths-plain", False), ("packed_index_lengths-factored", True),
        ("shared_lengths-plain", False), ("same_tensor-plain", False), ("odd_sizes-plain", True),
        ("alone_residual-factored", False),
    ],
)  # fmt: skip
def test_adem(name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        small_tiles(monkeypatch)
    tolerance.check(run, relatives.build(name, "adem", torch.bfloat16, DEVICE))


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("lengths-plain", "memvr", torch.float16), ("packed_index_lengths-factored", "memvr", torch.bfloat16),
        ("lengths-plain", "mapped", torch.float32), ("packed_index_lengths-factored", "mapped", torch.bfloat16),
        ("lengths-plain", "dropped", torch.float16), ("packed_index_lengths-factored", "dropped", torch.bfloat16),
    ],
)  # fmt: skip
def test_each_part(name: str, method: str, dtype: torch.dtype) -> None:
    tolerance.check(run, relatives.build(name, method, dtype, DEVICE))


@pytest.mark.parametrize(("form", "method"), [("plain", "dropped"), ("factored", "adem")])
def test_nan_reaches_only_the_rows_that_read_it(form: str, method: str) -> None:
    relatives.check_unread_nan(run, form, method)


def test_with_cublas() -> None:
    with override_implementation("cublas"):
        tolerance.check(run, relatives.build("shared_by_all-plain", "adem", torch.bfloat16, DEVICE))


@pytest.mark.parametrize("method", ["dropped", "adem"])
def test_recomputation_drops_the_same_slots(method: str) -> None:
    a = cases.build("one_each-factored", torch.bfloat16, DEVICE) | relatives.METHODS[method]  # near ties included
    kept, again = (tolerance.results(functools.partial(run, recompute=r), a) for r in (False, True))
    tolerance.assert_same(again, kept)


@pytest.mark.parametrize("name", ["lengths-plain", "index-factored"])
def test_with_dropout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
    monkeypatch.setattr("memvp_kernels.autograd.draw_seed", lambda device: seed)
    a = dict(relatives.build(name, "adem", torch.bfloat16, DEVICE), dropout_p=0.4)
    tolerance.check(run, a, keep=philox.keep_mask(seed, a["x"].shape[:-1].numel(), 7, 0.4))


def test_sums_over_a_shared_memory() -> None:
    """Each call's gradients are added to those of the later ones, as on the torch backend."""
    a = stack.arguments(torch.float32, index=True, visual_map="silu", visual_activation="identity")
    stack.check(cases.moved(a), backend="triton")
