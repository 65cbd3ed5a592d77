"""Gradients that PyTorch's older vmap has batched, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["one_by_one"]


def one_by_one(function: Callable[..., Sequence[Tensor]], given: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """`function(*given)`, once for each member of a batch of gradients.

    `torch.autograd.grad(is_grads_batched=True)` and `jacobian(vectorize=True)` batch with PyTorch's older vmap, for which neither a
    custom op nor an autograd function can have a rule.
    """
    batched = [t for t in given if t is not None and torch._C._functorch.is_legacy_batchedtensor(t)]
    if not batched:
        return function(*given)
    # A tensor without a batch at this level is expanded to the size given here, which no batch has.
    level = next(n for n in range(1, 64) if torch._remove_batch_dim(batched[0], n, 0, 0).shape[0])
    size = torch._remove_batch_dim(batched[0], level, 0, 0).shape[0]
    members = [
        t if not any(t is b for b in batched) else torch._remove_batch_dim(t, level, size, 0)  # type: ignore[arg-type]
        for t in given
    ]
    calls = [
        one_by_one(function, [m[i] if m is not None and m is not t else t for m, t in zip(members, given, strict=True)])
        for i in range(size)
    ]
    return tuple(torch._add_batch_dim(torch.stack(parts), 0, level) for parts in zip(*calls, strict=True))
