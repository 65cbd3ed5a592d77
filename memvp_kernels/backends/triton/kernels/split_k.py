"""Split-K: each split of a product leaves its partial sum in float32; they are added in order and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.runtime.pdl import pdl_options

__all__ = ["empty_splits", "reduce_splits", "reduce_splits_kernel"]

_BLOCK_ROWS, _BLOCK_COLUMNS = 4, 256


def empty_splits(splits: int, like: Tensor) -> Tensor | None:
    """Room for the partial sums, (splits, *like.shape) in float32; None with one split."""
    return like.new_empty(splits, *like.shape, dtype=torch.float32) if splits > 1 else None


def reduce_splits(partials: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """out = sum of partials + bias + residual, in float32 and always in that order.

    Args:
        partials: (splits, N, d) float32, contiguous.
        bias: (d,) or None, any float dtype.
        residual: (N, d) or None, any strides; may be `out`.
        out: (N, d), contiguous; also returned.
    """
    splits, rows, width = partials.shape
    grid = (launch.programs(rows, _BLOCK_ROWS), launch.programs(width, _BLOCK_COLUMNS))
    with launch.on_device(out):
        reduce_splits_kernel[grid](
            partials, bias, residual, out, bias.stride(0) if bias is not None else 0, *(residual.stride() if residual is not None else (0, 0)),
            rows, d=width, SPLITS=splits, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, DTYPE=launch.element_type(out.dtype),
            **pdl_options(out.device),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N"])
def reduce_splits_kernel(
    partials, bias, residual, out, stride_bias, stride_residual_n, stride_residual_d, N, d: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_ROWS), cdiv(d, BLOCK_COLUMNS))."""
    pdl_wait(PDL)
    o_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    o_column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (o_row < N) & (o_column < d)
    offset = o_row * d + o_column
    b_sum = tl.load(partials + offset, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        b_sum += tl.load(partials + split * tl.cast(N, tl.int64) * d + offset, mask=inside, other=0.0)
    if bias is not None:
        b_sum += tl.load(bias + o_column.to(tl.int64) * stride_bias, mask=o_column < d, other=0.0).to(tl.float32)
    if residual is not None:
        o_residual = o_row * stride_residual_n + o_column.to(tl.int64) * stride_residual_d
        b_sum += tl.load(residual + o_residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, b_sum.to(DTYPE), mask=inside)
