"""From a block of scores to the visual activations: visual = scale · keep · act(score) · [score ≥ θ]."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate
from memvp_kernels.backends.triton.device.dropout import keep_mask
from memvp_kernels.backends.triton.device.operands import tile_pointers

__all__ = ["Visual", "store_visual", "store_visual_subtiles"]


class Visual(NamedTuple):
    """How a score becomes a visual activation: scale · keep · act(score) · [score ≥ θ].

    Attributes:
        activation: its name.
        scale: visual_scale / (1 - dropout_p).
        seed: (1,) int64 or None without dropout.
        threshold: `philox.keep_threshold(dropout_p)`.
        theta: (N,) float32, of each row; None where nothing is dropped by its score.
    """

    activation: str
    scale: float
    seed: Tensor | None
    threshold: int
    theta: Tensor | None = None


@triton.jit
def store_visual_subtiles(
    b_scores,
    out,
    row,
    slot,
    first,
    end,
    slots,
    b_theta,
    M: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`store_visual` by subtiles of 32 columns: dropout's generator on a whole tile of 256 needs more registers than a thread has."""
    ROWS: tl.constexpr = b_scores.shape[0]
    SLOTS: tl.constexpr = b_scores.shape[1]
    if SLOTS > 32:
        low, high = tl.split(tl.permute(tl.reshape(b_scores, (ROWS, 2, SLOTS // 2)), (0, 2, 1)))
        store_visual_subtiles(low, out, row, slot, first, end, slots, b_theta, M, VISUAL_ACTIVATION, DTYPE)
        store_visual_subtiles(
            high, out, row, slot + SLOTS // 2, first, end, slots, b_theta, M, VISUAL_ACTIVATION, DTYPE
        )
    else:
        store_visual(b_scores, out, row, slot, first, end, slots, b_theta, M, VISUAL_ACTIVATION, DTYPE)


@triton.jit
def store_visual(
    b_scores,
    out,
    row,
    slot,
    first,
    end,
    slots,
    b_theta,
    M: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store scores and visual of rows [first, end) and return visual in DTYPE; slots from `slots` on are 0.

    Args:
        b_theta: (ROWS,), below which a score's visual is 0, or None; with it the scores come as they are kept.
        b_scores: a block at (row, slot) of the scores.
        out: (visual, scores, seed, stride_visual_n, scale, threshold); pointers to what is not wanted are None.
    """
    visual, scores, seed, stride_visual_n, scale, threshold = out
    ROWS: tl.constexpr = b_scores.shape[0]
    SLOTS: tl.constexpr = b_scores.shape[1]
    o_row = row + tl.arange(0, ROWS)
    o_slot = slot + tl.arange(0, SLOTS)
    inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_slot[None, :] < M)
    b_scores = tl.where(o_slot[None, :] < slots, b_scores, 0.0)
    if scores is not None:
        tl.store(tile_pointers(scores, row, slot, M, ROWS, SLOTS), b_scores.to(DTYPE), mask=inside)
    b_visual = activate(b_scores, VISUAL_ACTIVATION) * tl.cast(scale, tl.float32)
    if seed is not None:
        # A product, as in PyTorch: a dropped NaN stays one.
        b_visual *= keep_mask(seed, threshold, row, slot, ROWS, SLOTS).to(tl.float32)
    if b_theta is not None:
        b_visual *= (b_scores >= b_theta[:, None]).to(tl.float32)
    b_visual = b_visual.to(DTYPE)
    if visual is not None:
        tl.store(tile_pointers(visual, row, slot, stride_visual_n, ROWS, SLOTS), b_visual, mask=inside)
    return b_visual
