"""Launches that begin while the kernel before them ends: programmatic dependent launch, from sm_90 on.

Every kernel of the backend calls `follow` before its first access to memory. What ran before has then ended and its stores are seen, so a
stream orders the launches as ever; the next launch's programs may take the multiprocessors that this one's last wave leaves free,
and are there when it ends. Without the launch option both instructions do nothing. A warp that loads for the others waits for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from memvp_kernels.backends.triton import launch

__all__ = ["chained", "follow"]

_CHAINED = {"CHAINED": True, "launch_pdl": True}
_ALONE = {"CHAINED": False}


def chained(device: torch.device) -> dict[str, bool]:
    """What a launch on this device adds to its keyword arguments: the kernel's `CHAINED`, and Triton's option where it is set."""
    return _CHAINED if launch.architecture(device) >= 90 and not launch.interpreted() else _ALONE


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait for the launch before this one, and let the one after it begin."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
