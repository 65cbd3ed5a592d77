"""Compiles launches instead of running them, for a GPU that need not be here.

Needs a process without TRITON_INTERPRET (interpreted kernels are not compiled), and one process per architecture: what launches remember
of a device is not forgotten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from memvp_kernels.backends.triton.runtime import launch

__all__ = ["Compiled", "offline"]


@dataclass(frozen=True)
class Compiled:
    """One launch that was compiled instead.

    Attributes:
        name: the kernel's.
        arguments: by name.
        kernel: what Triton made, or None.
        error: why there is no kernel.
    """

    name: str
    arguments: dict[str, Any]
    kernel: Any
    error: str = ""

    def constant(self, *names: str) -> int:
        """The first of these compile-time arguments that the kernel has, or 0."""
        return next((self.arguments[n] for n in names if n in self.arguments), 0)


class _NoDevice(DriverBase):  # type: ignore[misc]
    """Answers what compiling asks of a driver."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class _NoProducts(TorchDispatchMode):
    """PyTorch's matrix products return memory that nobody filled: nothing here reads it, and a model's take minutes on a CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in ("mm", "addmm", "addmm_"):
            return func(*args, **kwargs)
        left, right = args[-2:]
        given = args[0] if name == "addmm_" else kwargs.get("out")
        return left.new_empty(left.shape[0], right.shape[1]) if given is None else given


@contextlib.contextmanager
def offline(architecture: int, multiprocessors: int | None = None) -> Iterator[list[Compiled]]:
    """Within it, launches on CPU tensors compile for a GPU and are listed; neither they nor matrix products run.

    Args:
        architecture: 80, 90, 100, 120.
        multiprocessors: of the GPU; None: the data sheet's.
    """
    launched: list[Compiled] = []
    run, known = JITFunction.run, (launch.architecture, launch._multiprocessors)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel, error = None, ""
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as e:  # a compiler pass may raise anything, and the next kernel may be fine
            error = f"{type(e).__name__}: {str(e)[-400:]}"
        own = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
        bound = self.signature.bind_partial(*args, **own).arguments
        launched.append(Compiled(self.__name__, bound, kernel, error))
        return kernel

    triton.runtime.driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    launch.architecture = lambda device: architecture  # type: ignore[assignment]
    launch._multiprocessors = lambda device: multiprocessors  # type: ignore[assignment]
    try:
        with _NoProducts():
            yield launched
    finally:
        JITFunction.run = run
        launch.architecture, launch._multiprocessors = known
        triton.runtime.driver.set_active(None)
