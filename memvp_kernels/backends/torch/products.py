"""Products of a few rows with a large matrix on a CPU, as in decode (docs/notes/few-rows-on-a-cpu.md)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_product_", "product"]

#: With more rows either order takes as long.
_FEW_ROWS = 64
_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def _few(a: Tensor) -> bool:
    """Whether MKL would run a @ b on one thread, and would not run bᵀ aᵀ so."""
    few = _MKL and 0 < a.shape[0] <= _FEW_ROWS and a.dtype == torch.float32 and a.is_cpu
    return few and torch.get_num_threads() > 1


def product(a: Tensor, b: Tensor, start: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """start + a @ b, (N, k) and (k, F) to (N, F), contiguous; `start` is (F,) or (N, F)."""
    if _few(a):
        found = _transposed(a, b)
        found = found if start is None else found.add_(start)
        return found.contiguous() if out is None else out.copy_(found)
    return torch.mm(a, b, out=out) if start is None else torch.addmm(start, a, b, out=out)


def add_product_(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a @ b."""
    if _few(a):
        y.add_(_transposed(a, b))
    else:
        y.addmm_(a, b)


def _transposed(a: Tensor, b: Tensor) -> Tensor:
    rows = a.shape[0]
    # A product with one vector would again run on one thread.
    left = a.contiguous() if rows > 1 else a.expand(2, -1).contiguous()
    return torch.mm(b.T, left.T).T[:rows]
