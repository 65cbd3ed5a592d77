"""Kernels compiled for a GPU that is not here, exactly as their launchers would launch them, and what their machine code says.

`offline(architecture)` puts a driver without a device under Triton: within it every launch of a kernel compiles for that architecture and
returns, so the specialisation (alignments, absent arguments, descriptors, tile) is the launcher's own. `inspect` reads the result:
registers, spills, shared memory, and for every loop with matrix instructions whether they overlap with anything.

Needs Triton compiling, not interpreting: a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from memvp_kernels.backends.triton.gemm import forced
from memvp_kernels.backends.triton.runtime import launch

__all__ = ["Compiled", "Loop", "Machine", "inspect", "offline", "read", "tool", "waits_first"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
_MEMORY = ("LDG", "LDGSTS", "STG", "ATOMG", "ATOM", "RED", "REDG", "LD", "ST", "UTMALDG", "UTMASTG", "UBLKCP")
_FOLLOWS = "ACQBULK"  # griddepcontrol.wait


@dataclass(frozen=True)
class Compiled:
    """One launch that was compiled instead.

    Attributes:
        name: the kernel's.
        programs: how many the launch has.
        constants: its arguments by name.
        kernel: what Triton made, or None.
        error: why there is no kernel.
    """

    name: str
    programs: int
    constants: dict[str, Any]
    kernel: Any
    error: str = ""

    def constant(self, *names: str) -> int:
        """The first of these compile-time arguments that the kernel has, or 0."""
        return next((self.constants[n] for n in names if n in self.constants), 0)

    @property
    def moved(self) -> int:
        """Bytes of the tensors among its arguments, those that two of them share once."""
        spans = []
        for argument in self.constants.values():
            described = isinstance(argument, (TensorDescriptor, GluonDescriptor))
            tensor = argument.base if described else argument
            if isinstance(tensor, Tensor):
                # A descriptor over two weights is longer than its base.
                shape = argument.shape if described else tensor.shape
                spans.append((tensor.data_ptr(), tensor.data_ptr() + math.prod(shape) * tensor.element_size()))
        total = end = 0
        for first, last in sorted(spans):
            total += max(last - max(first, end), 0)
            end = max(end, last)
        return total


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
def offline(architecture: int) -> Iterator[list[Compiled]]:
    """Within it, launches of kernels on CPU tensors compile for `architecture` and are listed; nothing runs.

    Every step takes its fused kernel: the library's products would run for real.
    """
    launched: list[Compiled] = []
    run, known = JITFunction.run, launch.architecture

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel, error = None, ""
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except (
            Exception
        ) as e:  # whatever a compiler pass raises is a finding about this kernel, and the next one may be fine
            error = f"{type(e).__name__}: {str(e)[-400:]}"
        bound = self.signature.bind_partial(*args, **_known(self, kwargs)).arguments
        launched.append(Compiled(self.__name__, math.prod(grid), bound, kernel, error))
        return kernel

    triton.runtime.driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    launch.architecture = lambda device: architecture  # type: ignore[assignment]
    try:
        with forced("fused"):
            yield launched
    finally:
        JITFunction.run = run
        launch.architecture = known
        triton.runtime.driver.set_active(None)


def _known(kernel: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name in kernel.signature.parameters}


@dataclass(frozen=True)
class Loop:
    """A loop with matrix instructions in it.

    Attributes:
        instructions: in one turn.
        matrix: matrix instructions in one turn.
        waits: of those, how many wait for the group before them (Hopper's gsb0).
        depth: groups that may still be running at the loop's wait; 0 means each step's products are awaited before the next begins.
        spills: loads and stores of spilled registers in one turn.
    """

    instructions: int
    matrix: int
    waits: int
    depth: int | None
    spills: int = 0

    @property
    def serialised(self) -> bool:
        """Hopper: every matrix instruction waits for the one before it. The warnings of ptxas miss some of these; the SASS doesn't."""
        return self.waits == self.matrix and self.matrix > 1


@dataclass(frozen=True)
class Machine:
    """What the machine code of one kernel says; shared memory and stack in bytes, tensor memory in columns.

    `follows`: it is launched while the kernel before it ends, and waits for that end before it touches device memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    matrix: dict[str, int] = field(default_factory=dict)
    tensor_loads: int = 0
    tensor_memory: int = 0
    loops: tuple[Loop, ...] = ()
    follows: bool = False


def inspect(compiled: Any) -> Machine:
    """Read the cubin of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (found,) = read(cubin).values()
    metadata = compiled.metadata
    return replace(
        found,
        shared=metadata.shared,
        warps=metadata.num_warps,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        follows=metadata.launch_pdl and found.follows,
    )


def read(cubin: Path) -> dict[str, Machine]:
    """The kernels of a file of machine code by name. What only their launch knows is left out: warps, dynamic shared and tensor memory."""
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", tool("nvdisasm", "-c", cubin), re.S))
    return {
        name: _machine(bodies[name], int(registers), int(stack), int(shared))
        for name, registers, stack, shared in usage
    }


def _machine(sass: str, registers: int, stack: int, shared: int) -> Machine:
    code, labels = _instructions(sass)
    counts = collections.Counter(_base(operation) for operation, _ in code)
    return Machine(
        registers=registers,
        stack=stack,
        spills=counts["LDL"] + counts["STL"],
        shared=shared,
        warps=0,
        matrix=dict(collections.Counter(operation for operation, _ in code if _base(operation) in _MATRIX)),
        tensor_loads=counts["UTMALDG"],
        loops=tuple(_loops(code, labels)),
        follows=waits_first([_base(operation) for operation, _ in code]),
    )


def waits_first(operations: list[str]) -> bool:
    """Whether the wait comes first, in the order of the code: every path begins at its top, where `chain.follow` stands."""
    return _FOLLOWS in operations and not set(operations[: operations.index(_FOLLOWS)]).intersection(_MEMORY)


def tool(name: str, *arguments: object, folder: Path | None = None) -> str:
    """What one of the CUDA programs of Triton's wheel prints; `folder`: where it runs."""
    environment = {**os.environ, "PATH": f"{_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(_TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def _base(operation: str) -> str:
    return operation.split(".")[0]


def _instructions(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(operation, operands) in order, and the index that each label points at."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"^(\.L_[\w.]+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);", line):
            code.append((found[1], found[2]))
    return code, labels


def _loops(code: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[Loop]:
    spans = set()
    for i, (operation, operands) in enumerate(code):
        if _base(operation) == "BRA" and (target := re.search(r"`\((\.L_[\w.]+)\)", operands)):
            start = labels.get(target[1], len(code))
            if start < i and any(_base(o) in _MATRIX for o, _ in code[start : i + 1]):
                spans.add((start, i))
    inner: list[tuple[int, int]] = []
    # Smallest first and none that overlaps: out-of-line waits make false loops round an epilogue.
    for start, end in sorted(spans, key=lambda s: s[1] - s[0]):
        if not any(start <= e and s <= end for s, e in inner):
            inner.append((start, end))
    for start, end in sorted(inner):
        body = code[start : end + 1]
        matrix = [operands for operation, operands in body if _base(operation) in _MATRIX]
        depths = [int(o.split(",")[-1].strip(), 16) for op, o in body if op.startswith("WARPGROUP.DEPBAR")]
        spills = sum(_base(operation) in ("LDL", "STL") for operation, _ in body)
        yield Loop(len(body), len(matrix), sum("gsb" in o for o in matrix), max(depths, default=None), spills)
