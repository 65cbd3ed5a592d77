"""Which backend computes a problem: the one asked for by name, or for "auto" the fastest valid one, never by timing at run time."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from memvp_kernels.problem import Problem

__all__ = ["available", "choose", "missing"]

_MODULES = {
    "torch": "memvp_kernels.backends.eager",
    "triton": "memvp_kernels.backends.triton",
    "cuda": "memvp_kernels.backends.cuda",
}

#: Decode kernels hold every token in registers; above this a tile of the Triton backend reads each weight as rarely.
_DECODE_TOKENS = 64


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(name: str, device: torch.device) -> str | None:
    """Why this machine can't run backend `name` on tensors of `device`; None when it can."""
    if name in ("auto", "torch"):
        return None
    if name == "triton":
        if not _has_triton():
            return "Triton is not installed (pip install triton)"
        if device.type == "cuda":
            if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
                return f"the GPU is sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}, and the kernels need sm_80 or newer"
            return None
        if _interpreting() and device.type == "cpu":
            return None
        return f"x is on {device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment before the first import, for tests on a CPU)"
    available_, reason, _ = _module("cuda").status()
    if not available_:
        return str(reason)
    if device.type != "cuda":
        return f"x is on {device}, and the extension's kernels need an NVIDIA GPU"
    return None


def available() -> dict[str, str | None]:
    """Every backend with the reason why it is missing here, None where it isn't; for the machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: missing(name, device) for name in _MODULES}


def require(name: str, device: torch.device) -> None:
    """Raises RuntimeError where a backend that was asked for by name can't run on this machine."""
    reason = missing(name, device)
    if reason is not None:
        raise RuntimeError(f"backend: wanted {name!r}, but {reason}; backend='auto' takes the fastest that works here")


def choose(problem: Problem, backend: str, *, training: bool) -> ModuleType:
    """The module that computes `problem`.

    Args:
        training: something is kept for a backward, or this is one.

    Raises:
        RuntimeError: `backend` was named, and this machine or this input can't have it; says which limit.
    """
    if backend != "auto":
        require(backend, problem.x.device)
        module = _module(backend)
        reason = module.unsupported(problem)
        if reason is None and training and backend == "cuda":
            reason = "it has no backward: call it under torch.no_grad(), or name 'triton' or 'torch' for training"
        if reason is not None:
            raise RuntimeError(f"backend: wanted {backend!r}, but {reason}; backend='auto' takes one that can")
        return module
    if problem.x.device.type == "cuda":
        if not training and problem.rows <= _DECODE_TOKENS and _fits("cuda", problem):
            return _module("cuda")
        if _fits("triton", problem):
            return _module("triton")
    return _module("torch")


def _fits(name: str, problem: Problem) -> bool:
    return missing(name, problem.x.device) is None and _module(name).unsupported(problem) is None
