"""Products of a few rows on several threads: within PyTorch's own error in every layout, and exchanged where that is faster alone."""

from __future__ import annotations

import pytest
import torch

from memvp_kernels.backends.torch.products import product
from tests import tolerance

pytestmark = pytest.mark.usefixtures("two_threads")
WIDTH, PAIRS = 400, 512  # of a matrix that is large enough


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64, 65])
@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_within_twice_pytorchs_own_error(rows: int, layout: str) -> None:
    torch.manual_seed(rows)
    a = torch.randn(WIDTH, rows).T if layout == "columns" else torch.randn(rows, WIDTH)
    a = torch.randn(WIDTH).expand(rows, WIDTH) if layout == "expanded" else a
    b = torch.randn(PAIRS, WIDTH).T
    bias, start, out = torch.randn(PAIRS), torch.randn(rows, PAIRS), torch.full((rows, PAIRS), torch.nan)
    exact = a.double() @ b.double()
    for found, wanted, plain in (
        (product(a, b), exact, a @ b),
        (product(a, b, bias), exact + bias, torch.addmm(bias, a, b)),
        (product(a, b, start, out=out), exact + start, torch.addmm(start, a, b)),
    ):
        assert found.is_contiguous()
        tolerance.assert_within_twice(found, wanted, [plain])
    assert torch.equal(out, product(a, b, start))


def test_when_it_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: seen.append(tuple(a.shape)) or a @ b)
    weight = torch.randn(PAIRS, WIDTH)
    own, exchanged = (3, WIDTH), (PAIRS, WIDTH) if torch.backends.mkl.is_available() else (3, WIDTH)  # type: ignore[no-untyped-call]
    for rows, b, wanted in (
        (3, weight.T, exchanged),
        (3, weight.T.contiguous(), own),
        (3, weight[:40].T, own),
        (3, weight.T.bfloat16(), own),
        (65, weight.T, (65, WIDTH)),
    ):
        product(torch.randn(rows, WIDTH, dtype=b.dtype), b)
        assert seen.pop() == wanted
    torch.set_num_threads(1)
    product(torch.randn(3, WIDTH), weight.T)
    assert seen.pop() == own
