"""Sums of a product whose K loop was cut into parts: each part's in float32 as its program left it, added up in order and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.pdl import chained, follow
from memvp_kernels.backends.triton.runtime import launch

__all__ = ["add_parts", "add_parts_kernel", "empty_parts"]

_BLOCK_ROWS, _BLOCK_COLUMNS = 4, 256


def empty_parts(splits: int, like: Tensor) -> Tensor | None:
    """Room for the parts, (splits, *like.shape) in float32; None where nothing is cut."""
    return like.new_empty(splits, *like.shape, dtype=torch.float32) if splits > 1 else None


def add_parts(parts: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> Tensor:
    """out = sum of parts + bias + residual, in float32 and always in that order.

    Args:
        parts: (splits, N, d) float32, contiguous.
        bias: (d,) or None, any float dtype.
        residual: (N, d) or None, any strides; may be `out`.
        out: (N, d), contiguous; also returned.
    """
    splits, rows, width = parts.shape
    grid = (launch.programs(rows, _BLOCK_ROWS), launch.programs(width, _BLOCK_COLUMNS))
    with launch.on_device(out):
        add_parts_kernel[grid](
            parts, bias, residual, out, bias.stride(0) if bias is not None else 0, *(residual.stride() if residual is not None else (0, 0)),
            rows, d=width, SPLITS=splits, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, DTYPE=launch.element_type(out.dtype),
            **chained(out.device),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N"])
def add_parts_kernel(
    parts, bias, residual, out, stride_bias, stride_residual_n, stride_residual_d, N, d: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_ROWS), cdiv(d, BLOCK_COLUMNS))."""
    follow(CHAINED)
    o_row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    o_column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (o_row < N) & (o_column < d)
    offset = o_row * d + o_column
    b_sum = tl.load(parts + offset, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        b_sum += tl.load(parts + part * tl.cast(N, tl.int64) * d + offset, mask=inside, other=0.0)
    if bias is not None:
        b_sum += tl.load(bias + o_column.to(tl.int64) * stride_bias, mask=o_column < d, other=0.0).to(tl.float32)
    if residual is not None:
        o_residual = o_row * stride_residual_n + o_column.to(tl.int64) * stride_residual_d
        b_sum += tl.load(residual + o_residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset, b_sum.to(DTYPE), mask=inside)
