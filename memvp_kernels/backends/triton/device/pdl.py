"""Launches that begin while the kernel before them ends: programmatic dependent launch, on Hopper and on Blackwell's sm_100 and sm_103.

Every kernel of the backend calls `follow` before its first access to memory. What ran before has then ended and its stores are seen, so a
stream orders the launches as ever; the next launch's programs may take the multiprocessors that this one's last wave leaves free,
and are there when it ends. Without the launch option both instructions do nothing. A warp that loads for the others waits for itself.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from memvp_kernels.backends.triton.runtime import launch

__all__ = ["chained", "follow"]

_DRIVER = 12_030
_CHAINED = {"CHAINED": True, "launch_pdl": True}
_ALONE = {"CHAINED": False}


def chained(device: torch.device) -> dict[str, bool]:
    """What a launch on this device adds to its keyword arguments: the kernel's `CHAINED`, and Triton's option where it is set."""
    return _CHAINED if launch.chip(device).chains and not launch.interpreted() and _captures() else _ALONE


@functools.cache
def _captures() -> bool:
    """Whether the driver takes such launches into a CUDA graph, which drivers before CUDA 12.3 can't; True where there is none to ask."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return version is None or version() >= _DRIVER


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait for the launch before this one, and let the one after it begin."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
