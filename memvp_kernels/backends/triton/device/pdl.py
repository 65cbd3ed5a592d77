"""Programmatic dependent launch (PDL): a kernel begins while the one before it ends, on sm_90 and newer.

Every kernel of the backend calls `pdl_wait` before its first access to memory, so the order of a stream holds. The next launch's
programs may take the multiprocessors that this one's last wave leaves free, and are there when it ends.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["pdl_wait"]


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for the launch before this one, whose stores are then visible, and let the one after it begin."""
    if PDL:
        # A warp that loads for the others waits for itself, so there is nothing to synchronise.
        gdc_wait()
        gdc_launch_dependents()
