"""Which backend computes a problem: the one asked for by name, or for "auto" the fastest valid one, never by timing at run time."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from memvp_kernels.cost import Rates, fastest, rates_of, sizes_of
from memvp_kernels.problem import Problem

__all__ = ["available", "choose", "missing"]

_MODULES = {
    "torch": "memvp_kernels.backends.torch.eager",
    "triton": "memvp_kernels.backends.triton",
    "cuda": "memvp_kernels.backends.cuda",
}

_NO_TRITON = "Triton is not installed (pip install triton)"

#: The decode kernel's limit, known here so that a training step never asks for the extension.
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
    if device.type == "cuda":
        return _missing_on_gpu(name, device)
    if name == "cuda":
        return (
            f"x is on {device}, and the extension's kernels need an NVIDIA GPU" if _extension()[0] else _extension()[1]
        )
    if not _has_triton():
        return _NO_TRITON
    if _interpreting() and device.type == "cpu":
        return None
    return f"x is on {device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment before the first import, for tests on a CPU)"


@functools.cache
def _missing_on_gpu(name: str, device: torch.device) -> str | None:
    """The same for a GPU, whose answer can't change while the process runs."""
    if name == "cuda":
        return None if _extension()[0] else _extension()[1]
    if not _has_triton():
        return _NO_TRITON
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"
    return None


def _extension() -> tuple[bool, str]:
    built, reason, _ = _module("cuda").status()
    return bool(built), str(reason)


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
    if backend == "torch":
        return _module("torch")
    if backend != "auto":
        require(backend, problem.x.device)
        module = _module(backend)
        reason = module.unsupported(problem)
        if reason is None and training and backend == "cuda":
            reason = "it has no backward: call it under torch.no_grad(), or name 'triton' or 'torch' for training"
        if reason is not None:
            raise RuntimeError(f"backend: wanted {backend!r}, but {reason}; backend='auto' takes one that can")
        return module
    device = problem.x.device
    if device.type != "cuda" or torch.version.hip is not None:
        return _module("torch")
    names = tuple(n for n in _MODULES if _fits(n, problem, training))
    return _module(fastest(sizes_of(problem), names, _rates(device)))


@functools.cache
def _rates(device: torch.device) -> Rates:
    return rates_of(torch.cuda.get_device_capability(device))


def _fits(name: str, problem: Problem, training: bool) -> bool:
    if name == "cuda" and (training or problem.rows > _DECODE_TOKENS):
        return False
    if missing(name, problem.x.device) is not None:
        return False
    module = _module(name)
    return module.unsupported(problem) is None and (name != "cuda" or bool(module.is_fast(problem)))
