"""The order statistic of a row's scores: θ, below which `visual_drop` zeroes them, and where they are all at hand the visual activations.

One program holds some rows of one sequence and builds θ bit by bit, from the highest: a bit stays 0 if more scores than are dropped lie
below the number with it set. Nothing is sorted and nothing but the result is written; padding is never counted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, load_tile
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual, store_visual
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["drop_fwd_kernel", "dropped_visual", "thresholds"]

_BLOCK = 4096  # scores of a program: 32 a thread
_MOST_SLOTS = 1024  # of a block; with more slots a row is read again for every bit
#: Bits of a number that is exact in float32, without the trailing ones that are always 0.
_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}


def thresholds(scores: Tensor, segments: Segments, memories: int, drop: float) -> Tensor:
    """θ (N,) in float32: of each row the (int(drop · m) + 1)-th lowest of its scores over the m valid slots of its image.

    Args:
        scores: (N, M), rows contiguous.
        segments: which rows read which memory row.
        memories: R.
        drop: γ.
    """
    theta = torch.empty(scores.shape[0], dtype=torch.float32, device=scores.device)
    _launch(scores, segments, memories, drop, theta, None, None)
    return theta


def dropped_visual(scores: Tensor, segments: Segments, memories: int, drop: float, visual: Visual) -> Tensor:
    """The visual activations (N, M), those of dropped scores zero; arguments as `thresholds`."""
    # No program covers the rows of packed x outside every sequence.
    rows, slots = scores.shape
    out = launch.empty_rows(rows, slots, scores, zero=segments.cu_seqlens is not None)
    _launch(scores, segments, memories, drop, None, out, visual)
    return out


def _launch(
    scores: Tensor,
    segments: Segments,
    memories: int,
    drop: float,
    theta: Tensor | None,
    out: Tensor | None,
    visual: Visual | None,
) -> None:
    rows, slots = scores.shape
    block_m = min(triton.next_power_of_2(max(slots, 16)), _MOST_SLOTS)
    block_n = _BLOCK // block_m if block_m >= 256 else 16
    with launch.on_device(scores):
        drop_fwd_kernel[(launch.programs(rows, block_n) + segments.sequences,)](
            scores, theta, out, visual.seed if visual is not None else None, segments.cu_seqlens, segments.index, segments.lengths,
            scores.stride(0), out.stride(0) if out is not None else 0, rows, segments.length or 0, segments.sequences, memories,
            visual.scale if visual is not None else 1.0, visual.threshold if visual is not None else 0,
            DROP=drop, M=slots, BITS=_BITS[scores.dtype], BLOCK_N=block_n, BLOCK_M=block_m,
            VISUAL_ACTIVATION=visual.activation if visual is not None else "identity",
            DTYPE=launch.element_type(scores.dtype), num_warps=4, **pdl_options(scores.device),
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "S", "R", "threshold"])
def drop_fwd_kernel(
    scores, theta, visual, seed, cu_seqlens, index, lengths, stride_scores_n, stride_visual_n, N, T, S, R, scale, threshold,
    DROP: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(N, BLOCK_N) + S,); theta or visual is None."""
    pdl_wait(PDL)
    RESIDENT: tl.constexpr = M <= BLOCK_M
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    row_tile, sequence = tile_sequence(tl.program_id(0), segments, BLOCK_N)
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, segments)
    if (first < row + BLOCK_N) & (end > row):
        slots = valid_slots(memory_row(sequence, segments), lengths, M)
        # As Python counts, in float64.
        dropped = (tl.full((1,), DROP, tl.float64) * slots.to(tl.float64)).to(tl.int32)
        b_resident = _load_order(scores, row, 0, slots, stride_scores_n, N, M, BITS, BLOCK_N, BLOCK_M)
        LOWEST: tl.constexpr = -(1 << (BITS - 1))
        b_order = tl.full((BLOCK_N,), LOWEST, tl.int32)
        for i in tl.range(0, BITS):
            b_candidate = b_order + (tl.full((1,), 1, tl.int32) << (BITS - 1 - i))
            b_below = tl.zeros((BLOCK_N,), tl.int32)
            if RESIDENT:
                b_below = tl.sum((b_resident < b_candidate[:, None]).to(tl.int32), axis=1)
            else:
                for slot in tl.range(0, M, BLOCK_M):
                    b_found = _load_order(scores, row, slot, slots, stride_scores_n, N, M, BITS, BLOCK_N, BLOCK_M)
                    b_below += tl.sum((b_found < b_candidate[:, None]).to(tl.int32), axis=1)
            b_order = tl.where(b_below <= dropped, b_candidate, b_order)
        SHIFT: tl.constexpr = 32 - BITS
        b_theta = _flip(b_order << SHIFT, BITS).to(tl.float32, bitcast=True)
        o_row = row + tl.arange(0, BLOCK_N)
        if theta is not None:
            tl.store(theta + o_row, b_theta, mask=(o_row >= first) & (o_row < end))
        if visual is not None:
            visual_out = (visual, None, seed, stride_visual_n, scale, threshold)
            # A few columns at a time, read again: dropout's generator on the whole block spilled 1.4 KB.
            SLOTS: tl.constexpr = BLOCK_M if BLOCK_M < 128 else 128
            for slot in tl.range(0, M, SLOTS):
                b_scores = load_tile(scores, row, slot, N, M, stride_scores_n, 1, BLOCK_N, SLOTS, POINTER)
                store_visual(
                    b_scores.to(tl.float32), visual_out, row, slot, first, end, slots, b_theta, M, VISUAL_ACTIVATION, DTYPE
                )  # fmt: skip


@triton.jit
def _load_order(
    scores, row, slot, slots, stride_scores_n, N, M: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """A block of scores as integers of BITS bits in the same order; slots that don't exist are never below another."""
    SHIFT: tl.constexpr = 32 - BITS
    HIGHEST: tl.constexpr = (1 << (BITS - 1)) - 1
    b_scores = load_tile(scores, row, slot, N, M, stride_scores_n, 1, BLOCK_N, BLOCK_M, POINTER).to(tl.float32)
    b_order = _flip(b_scores.to(tl.int32, bitcast=True), BITS) >> SHIFT
    return tl.where(slot + tl.arange(0, BLOCK_M)[None, :] < slots, b_order, HIGHEST)


@triton.jit
def _flip(bits, BITS: tl.constexpr):
    """A float32's bits as an integer in its order, and back: a negative number's but its sign, as far as they aren't always 0."""
    MASK: tl.constexpr = 0x7FFFFFFF >> (32 - BITS) << (32 - BITS)
    return bits ^ ((bits >> 31) & MASK)
