"""The output kernel: y = hidden V + visual Vv + b_V + residual, stored once.

One K loop over F, then a second one over the slots of every sequence that the row tile touches; with a factored memory that loop is dense,
[visual A | visual] against [W; p^v]. Where tiles are few, both loops are split (split-K) and a second launch adds the partial sums in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, TMA, load_memory_tile, load_tile, swizzle
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, sequence_of_row, valid_slots
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.kernels.split_k import empty_splits, reduce_splits
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.launch import strides
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["accumulate_memory", "add_memory", "add_product", "output_forward", "output_fwd_kernel"]


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
    aligned = (value is None or tma.load_mode(value) != POINTER.value) and all(map(tma.supports_tma, lefts))
    use_tma = aligned and launch.has_tma(like.device)
    load_value = tma.load_mode(value, use_tma)
    shape = launch.shape_of(like, pairs, slots, segments, descriptors=aligned)
    tile = tiles.output_tile(launch.chip(like.device), shape)
    load = TMA.value if use_tma else POINTER.value
    left = (tile.block_n, tile.block_k)

    partials = empty_splits(tile.splits, y)
    bias, start = (value_bias, residual) if partials is None else (None, None)
    grid = (launch.programs(rows, tile.block_n) * launch.programs(width, tile.columns), tile.splits)
    with launch.on_device(like):
        output_fwd_kernel[grid](
            tma.make_descriptor(hidden, left, load),
            tma.make_descriptor(value, (tile.block_k, tile.columns), load_value),
            bias,
            tma.make_descriptor(visual, left, load),
            tma.make_descriptor(memory, (1, tile.block_k, tile.columns), load),
            start, y if partials is None else partials, segments.cu_seqlens, segments.index, segments.lengths,
            *strides(hidden, 2), *strides(value, 2), *strides(bias, 1), *strides(visual, 2), *strides(memory, 3),
            *strides(start, 2),
            rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
            STRADDLES=memory is not None and tiles.straddles(segments.sequences, segments.length, tile.block_n),
            SPLITS=tile.splits, LOAD=load, LOAD_VALUE=load_value, PRECISION=shape.precision,
            DTYPE=launch.element_type(like.dtype if partials is None else partials.dtype), num_warps=tile.warps, num_stages=tile.stages, **pdl_options(like.device),
        )  # fmt: skip
    return y if partials is None else reduce_splits(partials, value_bias, residual, y)


def accumulate_memory(y: Tensor, left: Tensor, memory: Tensor, segments: Segments) -> Tensor:
    """Add left · memory to y (N, d) in place, each row of left times the memory that its sequence reads."""
    return output_forward(None, None, None, left, memory, segments, y, y, into=y)


@triton.jit(do_not_specialize=["N", "T", "S", "R"])
def output_fwd_kernel(
    hidden, value, value_bias, visual, memory, residual, y, cu_seqlens, index, lengths,
    stride_hidden_n, stride_hidden_f, stride_value_f, stride_value_d, stride_value_bias, stride_visual_n, stride_visual_m,
    stride_memory_r, stride_memory_m, stride_memory_d, stride_residual_n, stride_residual_d,
    N, T, S, R, F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STRADDLES: tl.constexpr,
    SPLITS: tl.constexpr, LOAD: tl.constexpr, LOAD_VALUE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles (BLOCK_N, BLOCK_D) of y, SPLITS); with SPLITS > 1 y is (SPLITS, N, d), one partial sum each."""
    pdl_wait(PDL)
    row_tile, column_tile = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(d, BLOCK_D), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_D

    split = 0
    if SPLITS > 1:
        split = tl.program_id(1)
        y += split.to(tl.int64) * N * d

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if hidden is not None:
        hidden_strides, value_strides = (stride_hidden_n, stride_hidden_f), (stride_value_f, stride_value_d)
        acc = add_product(
            acc, hidden, hidden_strides, value, value_strides, row, column, split, N, F, d, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, LOAD, LOAD_VALUE, PRECISION
        )  # fmt: skip
    if memory is not None:
        visual_strides, memory_strides = (
            (stride_visual_n, stride_visual_m),
            (stride_memory_r, stride_memory_m, stride_memory_d),
        )
        segments = (cu_seqlens, index, lengths, N, T, S, R)
        acc = add_memory(
            acc, visual, visual_strides, memory, memory_strides, row, column, split, segments, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, STRADDLES, LOAD, PRECISION
        )  # fmt: skip

    residual_strides = (stride_residual_n, stride_residual_d)
    _store_output(acc, row, column, value_bias, stride_value_bias, residual, residual_strides, y, N, d, DTYPE)


@triton.jit
def add_product(
    acc, left, left_strides, weight, weight_strides, row, column, split, N, F: tl.constexpr, d: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, LOAD: tl.constexpr, LOAD_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left · weight over one of SPLITS equal parts of F; the last ones read zeros past the end."""
    EVEN_K: tl.constexpr = F % (BLOCK_K * SPLITS) == 0
    LENGTH: tl.constexpr = (F + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    stride_left_n, stride_left_f = left_strides
    stride_weight_f, stride_weight_d = weight_strides
    for step in tl.range(0, LENGTH, BLOCK_K):
        k = split * LENGTH + step
        b_left = load_tile(left, row, k, N, F, stride_left_n, stride_left_f, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
        b_weight = load_tile(
            weight, k, column, F, d, stride_weight_f, stride_weight_d, BLOCK_K, BLOCK_D, LOAD_WEIGHT, EVEN_K, d % BLOCK_D == 0
        )  # fmt: skip
        acc = tl.dot(b_left, b_weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_memory(
    acc, left, left_strides, memory, memory_strides, row, column, split, segments, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STRADDLES: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + left · memory over one split of M, each row of left (N, M) times the memory row (M, d) that its sequence reads.

    A tile inside one sequence goes on in the same accumulator. A tile that may straddle sequences (STRADDLES) gives each sequence its own
    and adds that sequence's rows only. Zeroing the other rows of left would not do: 0 · NaN would carry one image's NaN into its neighbours.
    """
    cu_seqlens, index, lengths, N, T, S, R = segments
    if STRADDLES:
        o_row = row + tl.arange(0, BLOCK_N)
        first_sequence = tl.maximum(sequence_of_row(row, segments), 0)
        last_sequence = tl.minimum(sequence_of_row(tl.minimum(row + BLOCK_N, N) - 1, segments), S - 1)
        for sequence in tl.range(first_sequence, last_sequence + 1):
            first, end = sequence_bounds(sequence, segments)
            b_own = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            b_own = _add_one_memory(
                b_own, sequence, left, left_strides, memory, memory_strides, row, column, split, segments, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, LOAD, PRECISION
            )  # fmt: skip
            acc += tl.where((o_row[:, None] >= first) & (o_row[:, None] < end), b_own, 0.0)
    else:
        acc = _add_one_memory(
            acc, row // T, left, left_strides, memory, memory_strides, row, column, split, segments, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, LOAD, PRECISION
        )  # fmt: skip
    return acc


@triton.jit
def _add_one_memory(
    acc, sequence, left, left_strides, memory, memory_strides, row, column, split, segments, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = (M + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    cu_seqlens, index, lengths, N, T, S, R = segments
    stride_left_n, stride_left_m = left_strides
    read = memory_row(sequence, segments)
    slots = valid_slots(read, lengths, M)
    if LOAD == TMA:
        # A sequence without memory reads past the end, where TMA gives zeros: cheaper than a branch round the accumulator.
        read = tl.where(read < 0, R, read)
    for step in tl.range(0, LENGTH, BLOCK_K):
        k = split * LENGTH + step
        b_left = load_tile(left, row, k, N, M, stride_left_n, stride_left_m, BLOCK_N, BLOCK_K, LOAD)
        b_memory = load_memory_tile(
            memory, read, k, column, slots, d, memory_strides, BLOCK_K, BLOCK_D, LOAD, d % BLOCK_D == 0
        )  # fmt: skip
        acc = tl.dot(b_left, b_memory, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_output(
    acc,
    row,
    column,
    value_bias,
    stride_value_bias,
    residual,
    residual_strides,
    y,
    N,
    d: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y = acc + b_V + residual; a residual comes in subtiles of 64 columns: beside an accumulator of 256 it would not fit the registers."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[1]
    if residual is not None and BLOCK_D > 64:
        HALF: tl.constexpr = BLOCK_D // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        _store_output(low, row, column, value_bias, stride_value_bias, residual, residual_strides, y, N, d, DTYPE)
        _store_output(
            high, row, column + HALF, value_bias, stride_value_bias, residual, residual_strides, y, N, d, DTYPE
        )
    else:
        o_row = row + tl.arange(0, BLOCK_N)
        o_column = column + tl.arange(0, BLOCK_D)
        inside = (o_row[:, None] < N) & (o_column[None, :] < d)
        wide_column = o_column.to(tl.int64)
        if value_bias is not None:
            b_bias = tl.load(value_bias + wide_column * stride_value_bias, mask=o_column < d, other=0.0)
            acc += b_bias.to(tl.float32)[None, :]
        if residual is not None:
            stride_residual_n, stride_residual_d = residual_strides
            o_residual = o_row.to(tl.int64)[:, None] * stride_residual_n + wide_column[None, :] * stride_residual_d
            acc += tl.load(residual + o_residual, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + o_row.to(tl.int64)[:, None] * d + o_column[None, :], acc.to(DTYPE), mask=inside)
