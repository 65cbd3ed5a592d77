"""Backward of the core kernel: from e = dy [W; p^v]ᵀ to dscores and what multiplies the shared operands.

    dvisual = e_p + e_w A_vᵀ     dS = dvisual · d visual / d scores     t = dS A_k     u = visual A_v

[t | dS] (N, r + M) goes to the input's gradient and, like [u | visual], to those of the basis and the positions; dS and visual, with
c_w = x Wᵀ and e_w, give the gradients of the cores. One program has one (row tile, sequence) that meet, as in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import BY_POINTER, load_memory_tile, load_tile
from memvp_kernels.backends.triton.device.pdl import chained, follow
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.backends.triton.kernels.dhidden import store_visual_gradient
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Segments

__all__ = ["CoreGradients", "core_backward", "core_bwd_kernel"]


@dataclass(frozen=True)
class CoreGradients:
    """What one launch made, in x's dtype.

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
        need_key, need_value: dS; visual again.
        through_key, through_value: t too; u too. Each needs the one above it.
    """
    rows = scores.shape[0]
    memories, slots, rank = key_core.shape
    # Rows of packed x outside every sequence belong to no program.
    outside = segments.cu_seqlens is not None
    made = CoreGradients(
        key=launch.empty_rows(rows, rank + slots, scores, zero=outside) if need_key else None,
        value=launch.empty_rows(rows, rank + slots, scores, zero=outside) if need_value else None,
    )
    precision = launch.precision(scores.dtype)
    tile = backward_tiles.core_backward_tile(launch.chip(scores.device), scores.dtype, precision, rows=rows, rank=rank)
    parts = launch.programs(rank, tile.columns) if through_key or through_value else 1
    with launch.on_device(scores):
        core_bwd_kernel[(launch.programs(rows, tile.block_n) + segments.sequences, parts)](
            e, scores, key_core, value_core, made.key, made.value,
            made.key[:, rank:] if made.key is not None else None, made.value[:, rank:] if made.value is not None else None,
            visual.seed, segments.cu_seqlens, segments.index, segments.lengths,
            e.stride(0) if e is not None else 0, scores.stride(0), *key_core.stride(), *value_core.stride(),
            made.key.stride(0) if made.key is not None else 0, made.value.stride(0) if made.value is not None else 0,
            rows, segments.length or 0, segments.sequences, memories, visual.scale, visual.threshold,
            M=slots, RANK=rank, VALUE_POSITION=e is not None and e.shape[1] > rank, THROUGH_KEY=through_key, THROUGH_VALUE=through_value,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_k, BLOCK_R=min(tile.columns, 64), BLOCK_U=tile.columns,
            VISUAL_ACTIVATION=visual.activation, PRECISION=precision, DTYPE=launch.element_type(scores.dtype),
            num_warps=tile.warps, num_stages=tile.stages, **chained(scores.device),
        )  # fmt: skip
    return made


@triton.jit(do_not_specialize=["N", "T", "S", "R", "threshold"])
def core_bwd_kernel(
    e, scores, key_core, value_core, t, u, dscores, visual, seed, cu_seqlens, index, lengths,
    stride_e_n, stride_scores_n, stride_key_r, stride_key_m, stride_key_rank, stride_value_r, stride_value_m, stride_value_rank,
    stride_t_n, stride_u_n, N, T, S, R, scale, threshold, M: tl.constexpr, RANK: tl.constexpr, VALUE_POSITION: tl.constexpr,
    THROUGH_KEY: tl.constexpr, THROUGH_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) + S, parts); a rank wider than BLOCK_U forms dS and visual again for each part of t and u."""
    follow(CHAINED)
    WIDTH: tl.constexpr = RANK + M if VALUE_POSITION else RANK
    row_tile, sequence = tile_sequence(tl.program_id(0), cu_seqlens, S, T, BLOCK_N)
    part = tl.program_id(1) * BLOCK_U
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, cu_seqlens, S, T, N)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, index, S, R)
        slots = valid_slots(read, lengths, M)
        b_t = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
        b_u = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
        for slot in tl.range(0, M, BLOCK_M):
            b_dvisual = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if dscores is not None:
                for k in tl.range(0, RANK, BLOCK_R):
                    b_e = load_tile(
                        e, row, k, N, RANK, stride_e_n, 1, BLOCK_N, BLOCK_R, BY_POINTER, False, RANK % BLOCK_R == 0
                    )
                    b_value = load_memory_tile(
                        value_core, read, slot, k, slots, RANK, stride_value_r, stride_value_m, stride_value_rank, BLOCK_M, BLOCK_R, BY_POINTER
                    )  # fmt: skip
                    b_dvisual = tl.dot(b_e, b_value.to(DTYPE).T, b_dvisual, input_precision=PRECISION)
                if VALUE_POSITION:
                    b_dvisual += load_tile(
                        e, row, RANK + slot, N, WIDTH, stride_e_n, 1, BLOCK_N, BLOCK_M, BY_POINTER
                    ).to(tl.float32)
            # Only the first part of t and u stores what all parts form.
            b_dscores, b_visual = store_visual_gradient(
                b_dvisual, scores, dscores, visual, seed, stride_scores_n, stride_t_n, stride_u_n, row, slot, first, end, slots,
                scale, threshold, part == 0, M, VISUAL_ACTIVATION, DTYPE,
            )  # fmt: skip
            if THROUGH_KEY:
                b_key = load_memory_tile(
                    key_core, read, slot, part, slots, RANK, stride_key_r, stride_key_m, stride_key_rank, BLOCK_M, BLOCK_U, BY_POINTER
                )  # fmt: skip
                b_t = tl.dot(b_dscores, b_key.to(DTYPE), b_t, input_precision=PRECISION)
            if THROUGH_VALUE:
                b_value = load_memory_tile(
                    value_core, read, slot, part, slots, RANK, stride_value_r, stride_value_m, stride_value_rank, BLOCK_M, BLOCK_U, BY_POINTER
                )  # fmt: skip
                b_u = tl.dot(b_visual, b_value.to(DTYPE), b_u, input_precision=PRECISION)
        o_row = row + tl.arange(0, BLOCK_N)
        o_part = part + tl.arange(0, BLOCK_U)
        inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_part[None, :] < RANK)
        if THROUGH_KEY:
            tl.store(t + o_row.to(tl.int64)[:, None] * stride_t_n + o_part[None, :], b_t.to(DTYPE), mask=inside)
        if THROUGH_VALUE:
            tl.store(u + o_row.to(tl.int64)[:, None] * stride_u_n + o_part[None, :], b_u.to(DTYPE), mask=inside)
