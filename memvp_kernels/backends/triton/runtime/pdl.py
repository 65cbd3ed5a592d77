"""Which launches begin while the one before them ends: programmatic dependent launch (:mod:`..device.pdl`)."""

from __future__ import annotations

import ctypes
import functools

import torch

from memvp_kernels.backends.triton.runtime import launch

__all__ = ["pdl_options"]

_CAPTURABLE = 12_030  # CUDA 12.3: older drivers can't take such launches into a CUDA graph
_ON = {"PDL": True, "launch_pdl": True}
_OFF = {"PDL": False}


def pdl_options(device: torch.device) -> dict[str, bool]:
    """What a launch on this device adds to its keyword arguments: the kernel's `PDL`, and Triton's option where it is set."""
    return _ON if launch.chip(device).has_pdl and not launch.interpreted() and _driver_captures() else _OFF


@functools.cache
def _driver_captures() -> bool:
    version = _driver_version()
    return version is None or version >= _CAPTURABLE  # None: compiling for a GPU that is not here


def _driver_version() -> int | None:
    """The CUDA version of the installed driver, as 1000 · major + 10 · minor; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None
