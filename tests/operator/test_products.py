"""Products of a few rows on several threads: every layout, and no row in another's."""

from __future__ import annotations

import pytest
import torch

from memvp_kernels.backends.torch.products import add_product_, product
from tests import tolerance

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64, 65])
@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_within_twice_pytorchs_own_error(rows: int, layout: str) -> None:
    torch.manual_seed(rows)
    a = torch.randn(40, rows).T if layout == "columns" else torch.randn(rows, 40)
    a = torch.randn(40).expand(rows, 40) if layout == "expanded" else a
    b = torch.randn(70, 40).T if layout == "columns" else torch.randn(40, 70)
    bias, start, out = torch.randn(70), torch.randn(rows, 70), torch.full((rows, 70), torch.nan)
    y = start.clone()
    add_product_(y, a, b)
    exact = a.double() @ b.double()
    for found, wanted, plain in (
        (product(a, b), exact, a @ b),
        (product(a, b, bias), exact + bias, torch.addmm(bias, a, b)),
        (product(a, b, start, out=out), exact + start, torch.addmm(start, a, b)),
        (y, start + exact, torch.addmm(start, a, b)),
    ):
        tolerance.assert_within_twice(found, wanted, [plain])
    assert torch.equal(out, product(a, b, start))


def test_it_is_faster_by_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread PyTorch's own order is taken."""
    seen = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out=None: seen.append(a.shape) or a @ b)
    a, b = torch.randn(3, 40), torch.randn(40, 70)
    product(a, b)
    torch.set_num_threads(1)
    product(a, b)
    assert seen == [(70, 40), (3, 40)] if torch.backends.mkl.is_available() else [(3, 40)] * 2
