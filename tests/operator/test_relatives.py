"""A feature map of the scores, the lowest of them dropped, no activation: ADEM-VL and MemVR on the torch backend."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from memvp_kernels import fused_ffn
from tests import cases, relatives, tolerance
from tests.cases import DEVICE

run = functools.partial(fused_ffn, backend="torch")
NAMES = [
    f"{sharing}-{form}"
    for sharing in (
        "one_each", "index", "lengths", "packed_index_lengths", "shared_by_all", "shared_lengths", "same_tensor", "wide",
        "alone_residual", "no_positions", "one_slot", "odd_sizes",
    )
    for form in ("plain", "factored")
]  # fmt: skip
SEVERAL = ["index-plain", "packed_index_lengths-factored", "lengths-plain", "same_tensor-factored"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_adem(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, relatives.build(name, "adem", dtype, DEVICE))


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["memvr", "mapped", "dropped"])
@pytest.mark.parametrize("name", SEVERAL)
def test_each_part(name: str, method: str, dtype: torch.dtype) -> None:
    tolerance.check(run, relatives.build(name, method, dtype, DEVICE))


def visual(scores: Tensor, drop: float, **options: Any) -> Tensor:
    """What the operator makes of these scores (S, M), one row of x and one memory row for each."""
    S, M = scores.shape
    eye = torch.eye(M, dtype=scores.dtype, device=scores.device).expand(S, M, M)
    given = {"visual_activation": "identity", "visual_drop": drop, "backend": "torch"} | options
    return fused_ffn(scores[:, None], None, None, eye, eye, **given)[:, 0]


@pytest.mark.device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("drop", [0.1, 0.29, 0.3, 0.7, 0.999])
def test_how_many_are_dropped(drop: float, dtype: torch.dtype) -> None:
    """As Python counts: int(0.7 · 10) is 7, and int(0.29 · 100) is 28; padding is never counted."""
    lengths = torch.tensor([100, 1, 10, 30, 0, 99], device=DEVICE)
    scores = torch.stack([torch.randperm(100, device=DEVICE) - 50 for _ in lengths]).to(dtype)
    out = visual(scores, drop, visual_lengths=lengths)
    for found, given, length in zip(out, scores, lengths.tolist(), strict=True):
        dropped = given[:length].sort().indices[: int(drop * length)]
        expected = torch.where(torch.arange(100, device=DEVICE) < length, given, 0)
        expected[dropped] = 0
        assert torch.equal(found, expected)
    whole = visual(scores, drop)
    assert torch.equal(whole[0], out[0])
    assert ((whole == 0) == (scores < scores.sort(1).values[:, int(drop * 100), None]) | (scores == 0)).all()


@pytest.mark.device
def test_ties_stay_and_nothing_is_rescaled() -> None:
    scores = torch.tensor([[-1.0, -2.0, -2.0, 3.0, -2.0], [0.0, -0.0, 5.0, -0.0, 1.0]], device=DEVICE)
    out = visual(scores, 0.4)  # θ is the third lowest
    assert torch.equal(out, scores)
    assert torch.equal(
        visual(scores, 0.7), torch.where(scores < torch.tensor([[-1.0], [0.0]], device=DEVICE), 0, scores)
    )


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("method", ["dropped", "adem"])
def test_nan_reaches_only_the_rows_that_read_it(form: str, method: str) -> None:
    relatives.check_unread_nan(run, form, method)


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_nan_reaches_every_row_that_reads_it(form: str) -> None:
    """Dropping multiplies, as dropout does: NaN · 0 is NaN."""
    a = cases.build(f"one_each-{form}", torch.float32) | relatives.METHODS["adem"]
    a["visual_key"][1, 2] = float("nan")
    assert run(**a)[1].isnan().all()
    assert run(**a)[[0, 2]].isfinite().all()


def test_pytorch_counts_the_flops() -> None:
    """Keys multiplied out and met as they are, values factored."""
    a = cases.leaves(cases.build("index-factored", torch.float32) | relatives.METHODS["adem"], "x")
    N, d, F, M, r, R = 20, 24, 40, 7, 9, 1  # the count is of one image, whichever rows read it
    with FlopCounterMode(display=False) as counter:
        fused_ffn(**a)
    assert (
        counter.get_total_flops()
        == 3 * 2 * N * d * F + 2 * R * M * r * d + 2 * N * M * d + 2 * N * (r + M) * d + 2 * N * M * r
    )
