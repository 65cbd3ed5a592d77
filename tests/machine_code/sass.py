"""Reads machine code: the kernels of a cubin with their registers, spills, matrix instructions and loops. Needs no GPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Kernel", "Loop", "cubins", "kernels", "ptx_kernels", "ptx_targets"]

_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
_MEMORY = ("LDG", "LDGSTS", "STG", "ATOMG", "ATOM", "RED", "REDG", "LD", "ST", "UTMALDG", "UTMASTG", "UBLKCP")
_PDL_WAIT = "ACQBULK"  # griddepcontrol.wait
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")


@dataclass(frozen=True)
class Loop:
    """An innermost loop with matrix instructions.

    Attributes:
        matrix: matrix instructions in one turn.
        waits: of those, how many wait for the group before them (Hopper's gsb0).
    """

    matrix: int
    waits: int

    @property
    def serialised(self) -> bool:
        """Each wgmma waits for the one before it. ptxas warns of some of these; the SASS shows all."""
        return self.waits == self.matrix and self.matrix > 1


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; sizes in bytes.

    Attributes:
        name: mangled.
        registers: per thread.
        stack, local: per thread, in device memory: arrays that could not stay in registers, and spills.
        shared: static shared memory.
        code: (opcode with its modifiers, operands) in order.
        loops: those with matrix instructions.
    """

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    code: tuple[tuple[str, str], ...]
    loops: tuple[Loop, ...] = ()

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """How often each instruction stands there, with its modifiers ("LDG.E.128.CONSTANT")."""
        return collections.Counter(opcode for opcode, _ in self.code)

    def count(self, start: str, *modifiers: str) -> int:
        """Instructions whose opcode is `start` and that have all these modifiers."""
        parts = ((opcode.split("."), times) for opcode, times in self.opcodes.items())
        return sum(times for (first, *rest), times in parts if first == start and set(modifiers) <= set(rest))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL") + self.count("STL")

    @property
    def matrix(self) -> list[str]:
        """The kinds of matrix instructions: "HGMMA.64x256x16.F32.BF16"."""
        return sorted(opcode for opcode in self.opcodes if _base(opcode) in _MATRIX)

    @property
    def products(self) -> list[str]:
        """Hopper's matrix instructions whole; the last of a group names the counter that it is awaited by ("gsb0")."""
        return [opcode + operands for opcode, operands in self.code if _base(opcode) == "HGMMA"]

    @property
    def depths(self) -> list[int]:
        """Of each wait for matrix instructions, how many groups may go on."""
        waits = (o for opcode, o in self.code if opcode.startswith("WARPGROUP.DEPBAR"))
        return [int(operands.split(",")[-1].strip(), 16) for operands in waits]

    @property
    def waits_first(self) -> bool:
        """Whether the PDL wait stands before any access to device memory; every path begins at the top of the code."""
        order = [_base(opcode) for opcode, _ in self.code]
        return _PDL_WAIT in order and not set(order[: order.index(_PDL_WAIT)]).intersection(_MEMORY)


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of one file of machine code."""
    usage = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", _tool("cuobjdump", "-res-usage", cubin))
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", _tool("nvdisasm", "-c", cubin), re.S))
    return [_kernel(name, line, bodies[name]) for name, line in usage]


def _kernel(name: str, usage: str, sass: str) -> Kernel:
    sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if found := re.match(r"^(\.L_[\w.]+):", line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append((found[1], found[2]))
    loops = tuple(_loops(code, labels))
    return Kernel(name, sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"], tuple(code), loops)


def _loops(code: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[Loop]:
    spans = set()
    for i, (opcode, operands) in enumerate(code):
        if _base(opcode) == "BRA" and (target := re.search(r"`\((\.L_[\w.]+)\)", operands)):
            start = labels.get(target[1], len(code))
            if start < i and any(_base(o) in _MATRIX for o, _ in code[start : i + 1]):
                spans.add((start, i))
    inner: list[tuple[int, int]] = []
    # Smallest first, and none that overlaps: out-of-line waits look like loops around an epilogue.
    for start, end in sorted(spans, key=lambda s: s[1] - s[0]):
        if not any(start <= e and s <= end for s, e in inner):
            inner.append((start, end))
    for start, end in sorted(inner):
        matrix = [operands for opcode, operands in code[start : end + 1] if _base(opcode) in _MATRIX]
        yield Loop(len(matrix), sum("gsb" in operands for operands in matrix))


def cubins(library: Path, folder: Path) -> dict[str, list[Path]]:
    """Writes a library's machine code into `folder`: the files by architecture ("sm_90a")."""
    _tool("cuobjdump", "-xelf", "all", library.resolve(), folder=folder)
    found: dict[str, list[Path]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        match = re.search(r"\.(sm_\w+)\.cubin$", cubin.name)
        assert match is not None, f"no architecture in {cubin.name}"
        found.setdefault(match[1], []).append(cubin)
    return found


def ptx_targets(library: Path) -> set[str]:
    """Architectures for which a library carries PTX ("sm_90")."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", _tool("cuobjdump", "-lptx", library)))


def ptx_kernels(library: Path, folder: Path) -> set[str]:
    """Names of the kernels that a library carries as PTX; writes it into `folder`."""
    _tool("cuobjdump", "-xptx", "all", library.resolve(), folder=folder)
    return {name for ptx in folder.glob("*.ptx") for name in re.findall(r"\.entry\s+(\w+)", ptx.read_text())}


def _base(opcode: str) -> str:
    return opcode.split(".")[0]


@functools.cache
def _program(name: str) -> str:
    """cuobjdump and nvdisasm come with Triton's wheel and with a full CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(str(spec.origin)).parent / "backends/nvidia/bin" / name if spec else None
    found = str(wheel) if wheel is not None and wheel.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which comes with Triton and with the CUDA toolkit")
    return found


def _tool(name: str, *arguments: str | Path, folder: Path | None = None) -> str:
    program = _program(name)
    path = f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    done = subprocess.run(
        [program, *arguments], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
