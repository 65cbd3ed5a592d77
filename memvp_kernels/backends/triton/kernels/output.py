"""The output kernel: y = hidden V + visual Vv + b_V + residual, stored once.

One K loop over F, then a second, sequential one over the slots of every sequence that the row tile touches. A tile inside one sequence
goes on in the same accumulator. A tile that may straddle sequences gives each its own and adds that sequence's rows only: zeroing
the other rows of the left operand would not do, since 0 · NaN would carry one image's NaN into its neighbours' rows.
With a factored memory the second loop is dense: [visual A | visual] against [W; p^v], one sequence wide.

Where so few tiles would leave multiprocessors idle, both loops are cut into parts (`Tile.splits`), each a program of its own that stores
its sum in float32; a second launch adds the parts up in order, with bias and residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import BY_POINTER, BY_ROW, load_memory_tile, load_tile, swizzle
from memvp_kernels.backends.triton.device.pdl import chained, follow
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, sequence_of_row, valid_slots
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.kernels.split_k import add_parts, empty_parts
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Segments

__all__ = ["add_memory", "add_own_memory", "add_product", "output_forward", "output_fwd_kernel"]


def output_forward(
    hidden: Tensor | None,
    value: Tensor | None,
    value_bias: Tensor | None,
    visual: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    residual: Tensor | None,
    like: Tensor,
    into: Tensor | None = None,
) -> Tensor:
    """Launch the output kernel.

    Args:
        hidden: (N, F) with value (F, d), or both None.
        value_bias: (d,) or None, any float dtype.
        visual: (N, M) with memory (R, M, d) in x's dtype, zero past the valid slots, or both None.
        residual: (N, d) or None, any strides.
        like: x, for the result's dtype and device.
        into: (N, d), contiguous, to be written; may be `residual`, of which a program reads only what it then writes. None: a new one.

    Returns:
        y (N, d), contiguous.
    """
    rows, width = like.shape
    pairs = 0 if hidden is None else hidden.shape[1]
    slots = 0 if memory is None else memory.shape[1]
    y = torch.empty(rows, width, dtype=like.dtype, device=like.device) if into is None else into

    lefts = [t for t in (hidden, visual, memory) if t is not None]
    form_value = BY_ROW.value if value is None else launch.form_of(value)
    aligned = form_value != BY_POINTER.value and all(launch.describable(t) for t in lefts)
    tma = aligned and launch.has_tma(like.device)
    if not tma and value is not None:
        form_value = BY_POINTER.value
    shape = launch.shape_of(like, pairs, slots, segments, descriptors=aligned)
    tile = tiles.output_tile(launch.chip(like.device), shape)
    form = BY_ROW.value if tma else BY_POINTER.value
    left = (tile.block_n, tile.block_k)

    parts = empty_parts(tile.splits, y)
    start = (value_bias, residual) if parts is None else (None, None)
    grid = (launch.programs(rows, tile.block_n) * launch.programs(width, tile.columns), tile.splits)
    with launch.on_device(like):
        output_fwd_kernel[grid](
            launch.describe(hidden, left, form) if hidden is not None else None,
            launch.describe(value, (tile.block_k, tile.columns), form_value) if value is not None else None,
            start[0],
            launch.describe(visual, left, form) if visual is not None else None,
            launch.describe(memory, (1, tile.block_k, tile.columns), form) if memory is not None else None,
            start[1], y if parts is None else parts, segments.cu_seqlens, segments.index, segments.lengths,
            *_strides(hidden, 2), *_strides(value, 2), *_strides(start[0], 1), *_strides(visual, 2), *_strides(memory, 3),
            *_strides(start[1], 2),
            rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
            STRADDLES=memory is not None and tiles.straddles(segments.sequences, segments.length, tile.block_n),
            SPLITS=tile.splits, FORM=form, FORM_VALUE=form_value, PRECISION=shape.precision,
            DTYPE=launch.element_type(like.dtype if parts is None else parts.dtype), num_warps=tile.warps, num_stages=tile.stages, **chained(like.device),
        )  # fmt: skip
    return y if parts is None else add_parts(parts, value_bias, residual, y)


def add_own_memory(y: Tensor, left: Tensor, memory: Tensor, segments: Segments) -> Tensor:
    """y + left · memory in y's place, for a road that has computed y (N, d) and leaves a memory per sequence to this kernel."""
    return output_forward(None, None, None, left, memory, segments, y, y, into=y)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return tensor.stride() if tensor is not None else (0,) * count


@triton.jit(do_not_specialize=["N", "T", "S", "R"])
def output_fwd_kernel(
    hidden, value, value_bias, visual, memory, residual, y, cu_seqlens, index, lengths,
    stride_hidden_n, stride_hidden_f, stride_value_f, stride_value_d, stride_value_bias, stride_visual_n, stride_visual_m,
    stride_memory_r, stride_memory_m, stride_memory_d, stride_residual_n, stride_residual_d,
    N, T, S, R, F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STRADDLES: tl.constexpr,
    SPLITS: tl.constexpr, FORM: tl.constexpr, FORM_VALUE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles (BLOCK_N, BLOCK_D) of y, SPLITS); with SPLITS > 1 y is (SPLITS, N, d), a part each."""
    follow(CHAINED)
    row_tile, column_tile = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(d, BLOCK_D), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_D

    part = 0
    if SPLITS > 1:
        part = tl.program_id(1)
        y += part.to(tl.int64) * N * d

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if hidden is not None:
        acc = add_product(
            acc, hidden, value, row, column, part, stride_hidden_n, stride_hidden_f, stride_value_f, stride_value_d, N, F, d,
            BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, FORM, FORM_VALUE, PRECISION,
        )  # fmt: skip
    if memory is not None:
        acc = add_memory(
            acc, row, column, part, visual, memory, cu_seqlens, index, lengths, stride_visual_n, stride_visual_m, stride_memory_r,
            stride_memory_m, stride_memory_d, N, T, S, R, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, STRADDLES, FORM, PRECISION,
        )  # fmt: skip

    _store_output(
        acc, row, column, value_bias, residual, y, stride_value_bias, stride_residual_n, stride_residual_d, N, d,
        BLOCK_N, BLOCK_D, DTYPE,
    )  # fmt: skip


@triton.jit
def add_product(
    acc, left, weight, row, column, part, stride_left_n, stride_left_f, stride_weight_f, stride_weight_d, N, F: tl.constexpr, d: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    FORM: tl.constexpr, FORM_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left · weight over part `part` of the SPLITS equal ones of F; the last ones read zeros past the end."""
    WHOLE: tl.constexpr = F % (BLOCK_K * SPLITS) == 0
    LENGTH: tl.constexpr = (F + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    for step in tl.range(0, LENGTH, BLOCK_K):
        k = part * LENGTH + step
        b_left = load_tile(left, row, k, N, F, stride_left_n, stride_left_f, BLOCK_N, BLOCK_K, FORM, False, WHOLE)
        b_weight = load_tile(
            weight, k, column, F, d, stride_weight_f, stride_weight_d, BLOCK_K, BLOCK_D, FORM_WEIGHT, WHOLE, d % BLOCK_D == 0
        )  # fmt: skip
        acc = tl.dot(b_left, b_weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_output(
    acc, row, column, value_bias, residual, y, stride_value_bias, stride_residual_n, stride_residual_d,
    N, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y = acc + b_V + residual; a residual comes in pieces of 64 columns: beside an accumulator of 256 it would not fit the registers."""
    if residual is not None and BLOCK_D > 64:
        HALF: tl.constexpr = BLOCK_D // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        _store_output(
            low, row, column, value_bias, residual, y, stride_value_bias, stride_residual_n, stride_residual_d, N, d,
            BLOCK_N, HALF, DTYPE,
        )  # fmt: skip
        _store_output(
            high, row, column + HALF, value_bias, residual, y, stride_value_bias, stride_residual_n, stride_residual_d, N, d,
            BLOCK_N, HALF, DTYPE,
        )  # fmt: skip
    else:
        o_row = row + tl.arange(0, BLOCK_N)
        o_column = column + tl.arange(0, BLOCK_D)
        inside = (o_row[:, None] < N) & (o_column[None, :] < d)
        wide_column = o_column.to(tl.int64)
        if value_bias is not None:
            acc += tl.load(value_bias + wide_column * stride_value_bias, mask=o_column < d, other=0.0).to(tl.float32)[
                None, :
            ]
        if residual is not None:
            o_residual = o_row.to(tl.int64)[:, None] * stride_residual_n + wide_column[None, :] * stride_residual_d
            acc += tl.load(residual + o_residual, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + o_row.to(tl.int64)[:, None] * d + o_column[None, :], acc.to(DTYPE), mask=inside)


@triton.jit
def add_memory(
    acc, row, column, part, left, memory, cu_seqlens, index, lengths, stride_left_n, stride_left_m, stride_memory_r, stride_memory_m,
    stride_memory_d, N, T, S, R, d: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, STRADDLES: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left · memory over a part of M, each row of left (N, M) times the memory row (M, d) that its sequence reads."""
    if STRADDLES:
        o_row = row + tl.arange(0, BLOCK_N)
        first_sequence = tl.maximum(sequence_of_row(row, cu_seqlens, S, T), 0)
        last_sequence = tl.minimum(sequence_of_row(tl.minimum(row + BLOCK_N, N) - 1, cu_seqlens, S, T), S - 1)
        for sequence in tl.range(first_sequence, last_sequence + 1):
            first, end = sequence_bounds(sequence, cu_seqlens, S, T, N)
            b_own = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            b_own = _add_one_memory(
                b_own, sequence, row, column, part, left, memory, index, lengths, stride_left_n, stride_left_m, stride_memory_r,
                stride_memory_m, stride_memory_d, N, S, R, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, FORM, PRECISION,
            )  # fmt: skip
            acc += tl.where((o_row[:, None] >= first) & (o_row[:, None] < end), b_own, 0.0)
    else:
        acc = _add_one_memory(
            acc, row // T, row, column, part, left, memory, index, lengths, stride_left_n, stride_left_m, stride_memory_r,
            stride_memory_m, stride_memory_d, N, S, R, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, FORM, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _add_one_memory(
    acc, sequence, row, column, part, left, memory, index, lengths, stride_left_n, stride_left_m, stride_memory_r, stride_memory_m,
    stride_memory_d, N, S, R, d: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = (M + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    read = memory_row(sequence, index, S, R)
    slots = valid_slots(read, lengths, M)
    if FORM == BY_ROW:
        # A sequence without memory reads past the end, where TMA gives zeros: cheaper than a branch round the accumulator.
        read = tl.where(read < 0, R, read)
    for step in tl.range(0, LENGTH, BLOCK_K):
        k = part * LENGTH + step
        b_left = load_tile(left, row, k, N, M, stride_left_n, stride_left_m, BLOCK_N, BLOCK_K, FORM)
        b_memory = load_memory_tile(
            memory, read, k, column, slots, d, stride_memory_r, stride_memory_m, stride_memory_d, BLOCK_K, BLOCK_D, FORM, d % BLOCK_D == 0
        )  # fmt: skip
        acc = tl.dot(b_left, b_memory, acc, input_precision=PRECISION)
    return acc
