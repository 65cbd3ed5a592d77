"""Backward of the core kernel: from e = dy [W; p^v]ᵀ to dscores and what multiplies the shared operands.

    dvisual = e_p + e_w A_vᵀ     dS = dvisual · d visual / d scores     t = dS A_k     u = visual A_v

[t | dS] (N, r + M) goes to the input's gradient and, like [u | visual], to those of the basis and the positions; dS and visual, with
c_w = x Wᵀ and e_w, give the gradients of the cores. One program takes one row tile of one sequence, as in the forward.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, load_memory_tile, load_tile
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.backends.triton.kernels.dhidden import store_visual_gradient
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["CoreGradients", "core_backward", "core_bwd_kernel"]


class CoreGradients(NamedTuple):
    """Results of one launch in x's dtype.

    Attributes:
        key: [t | dS] (N, r + M), zero where a row sees no slot; None when not asked for. Without `through_key`, t is not set.
        value: [u | visual] (N, r + M), likewise.
    """

    key: Tensor | None
    value: Tensor | None


def core_backward(
    e: Tensor | None,
    scores: Tensor,
    key_core: Tensor,
    value_core: Tensor,
    segments: Segments,
    visual: Visual,
    *,
    need_key: bool,
    need_value: bool,
    through_key: bool,
    through_value: bool,
) -> CoreGradients:
    """Launch the kernel.

    Args:
        e: (N, r) or, with value positions, (N, r + M), rows contiguous; None without `need_key`.
        scores: (N, M), rows contiguous.
        key_core, value_core: (R, M, r), any strides, any float dtype: rounded to x's dtype where they enter a product.
        need_key, need_value: compute dS; recompute visual.
        through_key, through_value: compute t, which needs dS; u, which needs visual.
    """
    rows = scores.shape[0]
    memories, slots, rank = key_core.shape
    # No program covers the rows of packed x outside every sequence.
    outside = segments.cu_seqlens is not None
    out = CoreGradients(
        key=launch.empty_rows(rows, rank + slots, scores, zero=outside) if need_key else None,
        value=launch.empty_rows(rows, rank + slots, scores, zero=outside) if need_value else None,
    )
    precision = launch.precision(scores.dtype)
    tile = backward_tiles.core_backward_tile(launch.chip(scores.device), scores.dtype, precision, rows=rows, rank=rank)
    blocks = launch.programs(rank, tile.columns) if through_key or through_value else 1
    with launch.on_device(scores):
        core_bwd_kernel[(launch.programs(rows, tile.block_n) + segments.sequences, blocks)](
            e, scores, key_core, value_core, out.key, out.value,
            out.key[:, rank:] if out.key is not None else None, out.value[:, rank:] if out.value is not None else None,
            visual.seed, visual.theta, segments.cu_seqlens, segments.index, segments.lengths,
            e.stride(0) if e is not None else 0, scores.stride(0), *key_core.stride(), *value_core.stride(),
            out.key.stride(0) if out.key is not None else 0, out.value.stride(0) if out.value is not None else 0,
            rows, segments.length or 0, segments.sequences, memories, visual.scale, visual.threshold,
            M=slots, RANK=rank, VALUE_POSITION=e is not None and e.shape[1] > rank, THROUGH_KEY=through_key, THROUGH_VALUE=through_value,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_k, BLOCK_R=min(tile.columns, 64), BLOCK_U=tile.columns,
            VISUAL_ACTIVATION=visual.activation, PRECISION=precision, DTYPE=launch.element_type(scores.dtype),
            num_warps=tile.warps, num_stages=tile.stages, **pdl_options(scores.device),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "T", "S", "R", "threshold"])
def core_bwd_kernel(
    e, scores, key_core, value_core, t, u, dscores, visual, seed, theta, cu_seqlens, index, lengths,
    stride_e_n, stride_scores_n, stride_key_r, stride_key_m, stride_key_rank, stride_value_r, stride_value_m, stride_value_rank,
    stride_t_n, stride_u_n, N, T, S, R, scale, threshold, M: tl.constexpr, RANK: tl.constexpr, VALUE_POSITION: tl.constexpr,
    THROUGH_KEY: tl.constexpr, THROUGH_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) + S, cdiv(RANK, BLOCK_U)); with a rank wider than BLOCK_U each block of t and u recomputes dS and visual."""
    pdl_wait(PDL)
    WIDTH: tl.constexpr = RANK + M if VALUE_POSITION else RANK
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    key_strides, value_strides = (
        (stride_key_r, stride_key_m, stride_key_rank),
        (stride_value_r, stride_value_m, stride_value_rank),
    )
    visual_pass = (scores, dscores, visual, seed, theta, stride_scores_n, stride_t_n, stride_u_n, scale, threshold)
    row_tile, sequence = tile_sequence(tl.program_id(0), segments, BLOCK_N)
    column = tl.program_id(1) * BLOCK_U
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, segments)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, segments)
        slots = valid_slots(read, lengths, M)
        b_t = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
        b_u = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
        for slot in tl.range(0, M, BLOCK_M):
            b_dvisual = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if dscores is not None:
                for k in tl.range(0, RANK, BLOCK_R):
                    b_e = load_tile(
                        e, row, k, N, RANK, stride_e_n, 1, BLOCK_N, BLOCK_R, POINTER, False, RANK % BLOCK_R == 0
                    )
                    b_value = load_memory_tile(
                        value_core, read, slot, k, slots, RANK, value_strides, BLOCK_M, BLOCK_R, POINTER
                    )
                    b_dvisual = tl.dot(b_e, b_value.to(DTYPE).T, b_dvisual, input_precision=PRECISION)
                if VALUE_POSITION:
                    b_position = load_tile(e, row, RANK + slot, N, WIDTH, stride_e_n, 1, BLOCK_N, BLOCK_M, POINTER)
                    b_dvisual += b_position.to(tl.float32)
            # All blocks of t and u compute dS and visual; only the first one stores them. `tl.where`, because the interpreter of Triton 3.9
            # takes no comparison of scalars in a mask.
            stores = tl.where(column == 0, True, False)
            b_dscores, b_visual = store_visual_gradient(
                b_dvisual, visual_pass, row, slot, first, end, slots, stores, M, VISUAL_ACTIVATION, DTYPE
            )  # fmt: skip
            if THROUGH_KEY:
                b_key = load_memory_tile(
                    key_core, read, slot, column, slots, RANK, key_strides, BLOCK_M, BLOCK_U, POINTER
                )
                b_t = tl.dot(b_dscores, b_key.to(DTYPE), b_t, input_precision=PRECISION)
            if THROUGH_VALUE:
                b_value = load_memory_tile(
                    value_core, read, slot, column, slots, RANK, value_strides, BLOCK_M, BLOCK_U, POINTER
                )
                b_u = tl.dot(b_visual, b_value.to(DTYPE), b_u, input_precision=PRECISION)
        o_row = row + tl.arange(0, BLOCK_N)
        o_column = column + tl.arange(0, BLOCK_U)
        inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_column[None, :] < RANK)
        if THROUGH_KEY:
            tl.store(t + o_row.to(tl.int64)[:, None] * stride_t_n + o_column[None, :], b_t.to(DTYPE), mask=inside)
        if THROUGH_VALUE:
            tl.store(u + o_row.to(tl.int64)[:, None] * stride_u_n + o_column[None, :], b_u.to(DTYPE), mask=inside)
