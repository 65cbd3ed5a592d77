"""The sizes that decide how a launch runs: what the cost model knows of a call beside the chip."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Shape"]


class Shape(NamedTuple):
    """One FFN call, or one launch of it, as the cost model sees it. A tuple, because it is made and looked up at every launch.

    Attributes:
        dtype, precision: of the products, see `launch.precision`.
        rows, width, pairs: N, d, F.
        slots: columns of the memory's operand: M, or r + M (r without positions) for a factored memory.
        sequences: S; 1 where one memory serves all rows.
        length: T, None when packed.
        gated: gate and key, or key alone.
        descriptors: every operand can have one (`tma.supports_tma`), also on a chip without TMA, which then loads vectors.
        dense: the memory's products are dense ones over all rows.
    """

    dtype: torch.dtype
    precision: str
    rows: int
    width: int
    pairs: int
    slots: int
    sequences: int
    length: int | None
    gated: bool
    descriptors: bool
    dense: bool = False

    @property
    def branches(self) -> int:
        """P, the pre-activations."""
        return 1 + self.gated
