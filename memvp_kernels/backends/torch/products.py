"""Products of a few rows with a large matrix on a CPU, as in decode (docs/notes/few-rows-on-a-cpu.md)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]

#: With more rows, or a smaller matrix, either order takes as long.
_FEW_ROWS, _LARGE = 64, 3 * 2**16
_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def _exchanged(a: Tensor, b: Tensor) -> bool:
    """Whether MKL would run a @ b on one thread, and bᵀ aᵀ on all: b is a linear layer's weight, transposed."""
    few = _MKL and 0 < a.shape[0] <= _FEW_ROWS and b.stride(0) == 1 and b.numel() >= _LARGE
    return few and a.dtype == torch.float32 and a.is_cpu and torch.get_num_threads() > 1


def product(a: Tensor, b: Tensor, start: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """start + a @ b, (N, k) and (k, F) to (N, F), contiguous; `start` is (F,) or (N, F), of any dtype."""
    start = None if start is None else start.to(a.dtype)
    if not _exchanged(a, b):
        return torch.mm(a, b, out=out) if start is None else torch.addmm(start, a, b, out=out)
    rows = a.shape[0]
    # A product with one vector would again run on one thread.
    left = a.contiguous() if rows > 1 else a.expand(2, -1).contiguous()
    found = torch.mm(b.T, left.T).T[:rows]
    found = found if start is None else found.add_(start)
    return found.contiguous() if out is None else out.copy_(found)
