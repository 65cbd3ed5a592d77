"""Dropout's keep mask drawn in registers: the bits of :mod:`memvp_kernels.philox`, a function of (seed, token, slot) alone."""

import triton
import triton.language as tl

__all__ = ["keep_mask"]


@triton.jit
def keep_mask(seed, threshold, first_row, first_slot, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """(ROWS, SLOTS) bool, True where the visual activation is kept.

    Args:
        seed: pointer to one int64, read on the device so that a captured graph may draw another one at each replay.
        threshold: `philox.keep_threshold(p)`.
        first_row: row of x of the block's first row.
        first_slot: slot of the block's first column, a multiple of 4: one call of the generator serves four slots.
    """
    tl.static_assert(SLOTS % 4 == 0)
    group = (first_slot // 4 + tl.arange(0, SLOTS // 4)).to(tl.int32)[None, :]
    token = (first_row + tl.arange(0, ROWS)).to(tl.int32)[:, None]
    zero = tl.zeros((ROWS, SLOTS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), zero + group, zero + token, zero, zero)
    # Thresholded before the interleave: one byte per slot changes layout instead of four.
    k0 = _kept(w0, threshold)
    k1 = _kept(w1, threshold)
    k2 = _kept(w2, threshold)
    k3 = _kept(w3, threshold)
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (ROWS, SLOTS)) != 0


@triton.jit
def _kept(word, threshold):
    return ((word >> 8).to(tl.int32) >= threshold).to(tl.int8)
