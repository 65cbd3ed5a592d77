"""The core kernel of a factored memory, the only step that is an image's own.

    scores = c_p + c_w Aᵀ      visual = scale · keep · act(scores) · [scores ≥ θ]      u = visual A

c = [x Wᵀ | x p^kᵀ] (N, r + M) comes from the hidden kernel, and [u | visual] (N, r + M) goes to the output kernel; A (M, r) are an image's
two cores. One program takes one row tile of one sequence and walks through the slots, as attention walks through keys. Where θ needs a whole row
first, one launch stops at the scores, and a second begins with them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, load_memory_tile, load_tile, tile_pointers
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual, store_visual
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["core_forward", "core_fwd_kernel"]


def core_forward(
    c: Tensor,
    key_core: Tensor | None,
    value_core: Tensor | None,
    segments: Segments,
    visual: Visual,
    *,
    value_position: bool = False,
    save_scores: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the core kernel.

    Args:
        c: (N, r) or, with key positions, (N, r + M); without key_core the scores (N, M) themselves. Rows contiguous.
        key_core, value_core: (R, M, r), any strides, any float dtype: rounded to c's dtype where they enter a product. Without
            value_core the scores are all.
        value_position: the memory has value positions, so the output kernel needs visual itself beside u.
        save_scores: keep the scores.

    Returns:
        [u | visual] (N, r + M), or u alone (N, r), or None; scores (N, M) or None.
    """
    rows = c.shape[0]
    core = key_core if key_core is not None else value_core
    assert core is not None
    memories, slots, rank = core.shape
    # No program covers the rows of packed x outside every sequence; they add nothing to y.
    outside = segments.cu_seqlens is not None
    middle = None
    if value_core is not None:
        middle = launch.empty_rows(rows, rank + slots * value_position, c, zero=outside)
    scores = (c.new_zeros if outside else c.new_empty)(rows, slots) if save_scores else None
    precision = launch.precision(c.dtype)
    tile = tiles.core_tile(
        launch.chip(c.device), c.dtype, precision, rows=rows, rank=rank, given_scores=key_core is None
    )
    blocks = launch.programs(rank, tile.columns) if value_core is not None else 1
    grid = (launch.programs(rows, tile.block_n) + segments.sequences, blocks)
    with launch.on_device(c):
        core_fwd_kernel[grid](
            c, key_core, value_core, middle, middle[:, rank:] if middle is not None and value_position else None, scores, visual.seed, visual.theta,
            segments.cu_seqlens, segments.index, segments.lengths,
            c.stride(0), *launch.strides(key_core, 1), *launch.strides(value_core, 1), *launch.strides(middle, 1),
            rows, segments.length or 0, segments.sequences, memories, visual.scale, visual.threshold,
            *launch.strides(key_core, 3)[1:], *launch.strides(value_core, 3)[1:], M=slots, RANK=rank,
            KEY_POSITION=key_core is None or c.shape[1] > rank, BLOCK_N=tile.block_n, BLOCK_M=tile.block_k,
            BLOCK_R=min(tile.columns, 64), BLOCK_U=tile.columns, VISUAL_ACTIVATION=visual.activation,
            PRECISION=precision, DTYPE=launch.element_type(c.dtype), num_warps=tile.warps, num_stages=tile.stages, **pdl_options(c.device),
        )  # fmt: skip
    return middle, scores


@triton.jit(do_not_specialize=["N", "T", "S", "R", "threshold"])
def core_fwd_kernel(
    c, key_core, value_core, middle, visual, scores, seed, theta, cu_seqlens, index, lengths,
    stride_c_n, stride_key_r, stride_value_r, stride_middle_n, N, T, S, R, scale, threshold,
    stride_key_m: tl.constexpr, stride_key_rank: tl.constexpr, stride_value_m: tl.constexpr, stride_value_rank: tl.constexpr, M: tl.constexpr, RANK: tl.constexpr, KEY_POSITION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_U: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) + S, cdiv(RANK, BLOCK_U)); with a rank wider than BLOCK_U each block of u recomputes the scores.

    A core's inner strides are compiled in: a rank such as 136 is a multiple of 8, which Triton would not learn from an argument.
    """
    pdl_wait(PDL)
    POSITION: tl.constexpr = RANK if key_core is not None else 0  # column of c at which what is added to x Kvᵀ begins
    WIDTH: tl.constexpr = POSITION + M if KEY_POSITION else RANK
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    key_strides, value_strides = (
        (stride_key_r, stride_key_m, stride_key_rank),
        (stride_value_r, stride_value_m, stride_value_rank),
    )
    visual_out = (visual, scores, seed, stride_middle_n, scale, threshold)
    row_tile, sequence = tile_sequence(tl.program_id(0), segments, BLOCK_N)
    column = tl.program_id(1) * BLOCK_U
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, segments)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, segments)
        slots = valid_slots(read, lengths, M)
        u = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
        b_theta = None
        if theta is not None:
            b_theta = tl.load(theta + row + tl.arange(0, BLOCK_N), mask=row + tl.arange(0, BLOCK_N) < N, other=0.0)
        for slot in tl.range(0, M, BLOCK_M):
            b_scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            if key_core is not None:
                for k in tl.range(0, RANK, BLOCK_R):
                    b_c = load_tile(
                        c, row, k, N, RANK, stride_c_n, 1, BLOCK_N, BLOCK_R, POINTER, False, RANK % BLOCK_R == 0
                    )
                    b_key = load_memory_tile(
                        key_core, read, slot, k, slots, RANK, key_strides, BLOCK_M, BLOCK_R, POINTER
                    )
                    b_scores = tl.dot(b_c, b_key.to(DTYPE).T, b_scores, input_precision=PRECISION)
            if KEY_POSITION:
                b_position = load_tile(c, row, POSITION + slot, N, WIDTH, stride_c_n, 1, BLOCK_N, BLOCK_M, POINTER)
                b_scores += b_position.to(tl.float32)
            # All blocks of u compute the scores; only the first one stores them.
            stored_end = tl.where(column == 0, end, first)
            b_visual = store_visual(
                b_scores, visual_out, row, slot, first, stored_end, slots, b_theta, M, VISUAL_ACTIVATION, DTYPE
            )  # fmt: skip
            if value_core is not None:
                b_value = load_memory_tile(
                    value_core, read, slot, column, slots, RANK, value_strides, BLOCK_M, BLOCK_U, POINTER
                )
                u = tl.dot(b_visual, b_value.to(DTYPE), u, input_precision=PRECISION)
        if middle is not None:
            o_row = row + tl.arange(0, BLOCK_N)
            o_u = column + tl.arange(0, BLOCK_U)
            inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_u[None, :] < RANK)
            tl.store(tile_pointers(middle, row, column, stride_middle_n, BLOCK_N, BLOCK_U), u.to(DTYPE), mask=inside)
