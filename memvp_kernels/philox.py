"""Dropout's random bits: Philox4x32-10, a function of the seed and of (token, slot) alone.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Every backend draws the same bits, so a mask is never
stored, and a forward and a backward from different backends agree. One call of the generator serves four neighbouring slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask", "keep_threshold", "philox4x32"]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def keep_threshold(p: float) -> int:
    """A 24-bit draw below this drops: p = 0 drops nothing, p = 1 everything."""
    return round(p * 2**24)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for 32-bit words held in int64; the product wraps past 63 bits, its 64 bits stay right."""
    product = b * a
    return (product >> 32).bitwise_and_(_WORD), product.bitwise_and_(_WORD)


def philox4x32(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (in int64) for each counter; the key is the seed's low and high words."""
    c0, c1, c2, c3 = counter
    steps = torch.arange(_ROUNDS, dtype=torch.int64, device=seed.device)
    keys = [((word & _WORD) + steps * weyl) & _WORD for word, weyl in zip((seed, seed >> 32), _WEYL, strict=True)]
    for k0, k1 in zip(*(k.unbind() for k in keys), strict=True):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, slots: int, p: float) -> Tensor:
    """(N, M) bool: True where the visual activation of (token, slot) is kept."""
    groups = -(-slots // 4)
    slot = torch.arange(groups, dtype=torch.int64, device=seed.device)[None, :]
    token = torch.arange(rows, dtype=torch.int64, device=seed.device)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = torch.stack([w.expand(rows, groups) for w in philox4x32(seed, (slot, token, zero, zero))], dim=-1)
    return ((words >> 8) >= keep_threshold(p)).reshape(rows, groups * 4)[:, :slots]
