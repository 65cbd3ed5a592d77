"""Compiles Triton kernels for a GPU that is not here, exactly as their launchers would launch them.

Needs a process without TRITON_INTERPRET: interpreted kernels are not compiled.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from memvp_kernels.backends.triton.gemm import forced
from memvp_kernels.backends.triton.runtime import launch

__all__ = ["Compiled", "offline"]


@dataclass(frozen=True)
class Compiled:
    """One launch that was compiled instead.

    Attributes:
        name: the kernel's.
        programs: how many the launch has.
        arguments: by name.
        kernel: what Triton made, or None.
        error: why there is no kernel.
    """

    name: str
    programs: int
    arguments: dict[str, Any]
    kernel: Any
    error: str = ""

    def constant(self, *names: str) -> int:
        """The first of these compile-time arguments that the kernel has, or 0."""
        return next((self.arguments[n] for n in names if n in self.arguments), 0)


class _NoDevice(DriverBase):  # type: ignore[misc]
    """Answers what compiling asks of a driver; the architecture serves as the device's number, so that caches stay apart."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_device(self) -> int:
        return self._architecture

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


@contextlib.contextmanager
def offline(architecture: int, implementation: str = "fused") -> Iterator[list[Compiled]]:
    """Within it, launches on CPU tensors compile for `architecture` and are listed; nothing runs.

    Args:
        architecture: 80, 90, 100, 120.
        implementation: of the large products; cuBLAS's would run for real.
    """
    launched: list[Compiled] = []
    run, known = JITFunction.run, launch.architecture

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel, error = None, ""
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as e:  # a compiler pass may raise anything, and the next kernel may be fine
            error = f"{type(e).__name__}: {str(e)[-400:]}"
        own = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
        bound = self.signature.bind_partial(*args, **own).arguments
        launched.append(Compiled(self.__name__, math.prod(grid), bound, kernel, error))
        return kernel

    triton.runtime.driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    launch.architecture = lambda device: architecture  # type: ignore[assignment]
    try:
        with forced(implementation):
            yield launched
    finally:
        JITFunction.run = run
        launch.architecture = known
        triton.runtime.driver.set_active(None)
