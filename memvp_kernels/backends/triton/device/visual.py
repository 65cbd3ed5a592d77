"""What becomes of a score: visual = scale · keep · act(score), wherever a kernel has formed a block of scores."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate
from memvp_kernels.backends.triton.device.dropout import keep_mask
from memvp_kernels.backends.triton.device.operands import tile_pointers

__all__ = ["Visual", "store_visual", "store_visual_pieces"]


@dataclass(frozen=True)
class Visual:
    """What becomes of a score: visual = scale · keep · act(score).

    Attributes:
        activation: its name.
        scale: visual_scale / (1 - dropout_p).
        seed: (1,) int64 or None without dropout.
        threshold: `philox.keep_threshold(dropout_p)`.
    """

    activation: str
    scale: float
    seed: Tensor | None
    threshold: int


@triton.jit
def store_visual_pieces(
    b_scores, visual, scores, seed, stride_visual_n, row, slot, first, end, slots, scale, threshold,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`store_visual` in pieces of 32 columns: dropout's generator on a whole tile of 256 needs more registers than a thread has."""
    if BLOCK_M > 32:
        low, high = tl.split(tl.permute(tl.reshape(b_scores, (BLOCK_N, 2, BLOCK_M // 2)), (0, 2, 1)))
        store_visual_pieces(
            low, visual, scores, seed, stride_visual_n, row, slot, first, end, slots, scale, threshold, M,
            BLOCK_N, BLOCK_M // 2, VISUAL_ACTIVATION, DTYPE,
        )  # fmt: skip
        store_visual_pieces(
            high, visual, scores, seed, stride_visual_n, row, slot + BLOCK_M // 2, first, end, slots, scale, threshold, M,
            BLOCK_N, BLOCK_M // 2, VISUAL_ACTIVATION, DTYPE,
        )  # fmt: skip
    else:
        store_visual(
            b_scores, visual, scores, seed, stride_visual_n, row, slot, first, end, slots, scale, threshold, M,
            BLOCK_N, BLOCK_M, VISUAL_ACTIVATION, DTYPE,
        )  # fmt: skip


@triton.jit
def store_visual(
    b_scores, visual, scores, seed, stride_visual_n, row, slot, first, end, slots, scale, threshold,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store scores and visual of rows [first, end) and return visual, (BLOCK_N, BLOCK_M) in DTYPE; slots from `slots` on are 0."""
    o_row = row + tl.arange(0, BLOCK_N)
    o_slot = slot + tl.arange(0, BLOCK_M)
    inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_slot[None, :] < M)
    b_scores = tl.where(o_slot[None, :] < slots, b_scores, 0.0)
    if scores is not None:
        tl.store(tile_pointers(scores, row, slot, M, BLOCK_N, BLOCK_M), b_scores.to(DTYPE), mask=inside)
    b_visual = activate(b_scores, VISUAL_ACTIVATION) * tl.cast(scale, tl.float32)
    if seed is not None:
        # A product, as in PyTorch: a dropped NaN stays one.
        b_visual *= keep_mask(seed, threshold, row, slot, BLOCK_N, BLOCK_M).to(tl.float32)
    b_visual = b_visual.to(DTYPE)
    if visual is not None:
        tl.store(tile_pointers(visual, row, slot, stride_visual_n, BLOCK_N, BLOCK_M), b_visual, mask=inside)
    return b_visual
