"""The compiled extension: its import, what it was built for, and whether this machine can run it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["Status", "device_limit", "hopper_limit", "hopper_status", "load", "runs_on", "status"]

_NAME = "memvp_kernels._C"
#: What the backend reads of the extension. A library left from an earlier build may lack some of it.
_INTERFACE = (
    "cuda", "archs", "max_tokens", "tensor_names", "type_codes", "activation_codes", "form_codes", "gemm_codes", "FfnDecodeParams", "gemm",
)  # fmt: skip
#: The one architecture whose instructions the kernels of csrc/hopper are made of, and the chip that has them.
_HOPPER, _HOPPER_CAPABILITY = "90a", (9, 0)
_NOT_BUILT = (
    "the CUDA extension was not built: when memvp_kernels was installed there was no nvcc, or MEMVP_CUDA=0 was set; "
    "install it again where nvcc is found (set CUDA_HOME, and MEMVP_CUDA=require to see why it is not built)"
)


class Status(NamedTuple):
    """What `python -m memvp_kernels` prints of this backend.

    Attributes:
        available: the extension is there and the current GPU runs it.
        reason: why not, and what would help; "" when available.
        build: of the extension, where there is one: "cuda" (the toolkit's version), "archs" (the targets, ";" between them).
    """

    available: bool
    reason: str
    build: dict[str, str]


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    """(the extension, "") or (None, why there is none that works)."""
    again = "install memvp_kernels again, with MEMVP_CUDA=require to see what fails"
    try:
        module = importlib.import_module(_NAME)
    except Exception as error:  # a library that does not load may raise anything: then it is a missing part
        if isinstance(error, ModuleNotFoundError) and error.name == _NAME:
            return None, _NOT_BUILT
        return None, f"the CUDA extension does not load ({type(error).__name__}: {error}); {again}"
    lacking = [name for name in _INTERFACE if not hasattr(module, name)]
    if lacking:
        return None, f"the CUDA extension is of another version of memvp_kernels (it has no {lacking[0]}); {again}"
    return module, ""


def load() -> ModuleType | None:
    """The extension, or None where it was not built, does not load or is of another version."""
    return _import()[0]


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `archs` (as in MEMVP_CUDA_ARCHS) has code for a GPU of this compute capability.

    Machine code runs on later minor versions of its major version; with the suffix "a" on exactly its own chip, with "f"
    within its family; PTX ("+PTX") on its chip and on every newer one.
    """
    return any(_target_runs(arch, capability) for arch in archs.split(";"))


def _target_runs(arch: str, capability: tuple[int, int]) -> bool:
    number = arch.removesuffix("+PTX")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return capability == built
    if number.endswith("f") or arch == number:
        return capability[0] == built[0] and capability >= built
    return capability >= built


@functools.cache
def device_limit(index: int) -> str | None:
    """Why GPU `index` cannot run the extension; None: it can."""
    extension, missing = _import()
    if extension is None:
        return missing
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return (
            f"it needs a GPU of compute capability 8.0 or newer, and cuda:{index} has {capability[0]}.{capability[1]}"
        )
    if not runs_on(extension.archs, capability):
        return (
            f"the CUDA extension was built for {extension.archs}, and cuda:{index} has compute capability "
            f"{capability[0]}.{capability[1]}; install it again with that in MEMVP_CUDA_ARCHS"
        )
    return None


@functools.cache
def hopper_limit(index: int) -> str | None:
    """Why GPU `index` cannot run the extension's Hopper kernels, which are Hopper's alone; None: it can."""
    limit = device_limit(index)
    if limit is not None:
        return limit
    capability = torch.cuda.get_device_capability(index)
    if capability != _HOPPER_CAPABILITY:
        return f"wgmma is Hopper's (compute capability 9.0), and cuda:{index} has {capability[0]}.{capability[1]}"
    extension = load()
    assert extension is not None, "device_limit looked"
    if _HOPPER not in extension.archs.split(";"):
        return (
            f"the CUDA extension was built for {extension.archs}; install it again with {_HOPPER} in MEMVP_CUDA_ARCHS"
        )
    return None


@functools.cache
def _machine_limit() -> str | None:
    """Why no GPU of this machine can run the extension."""
    extension, missing = _import()
    if extension is None:
        return missing
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU (no driver, or hidden by CUDA_VISIBLE_DEVICES)"
    return None


def status() -> Status:
    """Whether this machine can use the backend, and why not."""
    extension = load()
    build = {} if extension is None else {"cuda": extension.cuda, "archs": extension.archs}
    reason = _machine_limit() or device_limit(torch.cuda.current_device())
    return Status(reason is None, reason or "", build)


def hopper_status() -> str | None:
    """Why this machine cannot run the Hopper kernels; None: it can."""
    return _machine_limit() or hopper_limit(torch.cuda.current_device())
