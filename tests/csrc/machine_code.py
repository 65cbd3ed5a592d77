"""What nvcc made of a library: its kernels per architecture, with registers, stack and instructions. Needs no GPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture; sizes in bytes.

    Attributes:
        name: mangled.
        registers: per thread.
        stack, local: per thread, in device memory: arrays that could not stay in registers, and spills.
        shared: static shared memory.
        opcodes: how often each instruction stands there, with its modifiers ("LDG.E.128.CONSTANT").
        products: Hopper's products in their order, whole; the last one of a group names the counter that it is waited by ("gsb0").
        depths: of the waits for them in their order, how many groups may go on.
    """

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    opcodes: Mapping[str, int]
    products: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()

    def count(self, start: str, *modifiers: str) -> int:
        """Instructions whose opcode is `start` and that have all these modifiers."""
        wanted = set(modifiers)
        parts = ((opcode.split("."), times) for opcode, times in self.opcodes.items())
        return sum(times for (first, *rest), times in parts if first == start and wanted <= set(rest))


def cubins(library: Path, folder: Path) -> dict[str, list[Path]]:
    """Writes the library's machine code into `folder`: the files by architecture ("sm_90a")."""
    _tool("cuobjdump", "-xelf", "all", str(library.resolve()), folder=folder)
    found: dict[str, list[Path]] = {}
    for cubin in sorted(folder.glob("*.cubin")):
        match = re.search(r"\.(sm_\w+)\.cubin$", cubin.name)
        assert match is not None, f"no architecture in {cubin.name}"
        found.setdefault(match[1], []).append(cubin)
    return found


def ptx_targets(library: Path) -> set[str]:
    """Architectures for which the library carries PTX ("sm_90")."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", _tool("cuobjdump", "-lptx", str(library))))


def ptx_kernels(library: Path, folder: Path) -> set[str]:
    """Names of the kernels that the library carries as PTX; writes it into `folder`."""
    _tool("cuobjdump", "-xptx", "all", str(library.resolve()), folder=folder)
    return {name for ptx in folder.glob("*.ptx") for name in re.findall(r"\.entry\s+(\w+)", ptx.read_text())}


def kernels(cubin: Path) -> list[Kernel]:
    """The kernels of one file of machine code."""
    usage = _tool("cuobjdump", "-res-usage", str(cubin))
    code = _tool("nvdisasm", "-c", str(cubin))
    bodies = dict(re.findall(r"\.text\.(\S+):\n(.*?)(?=\n\s*\.section|\Z)", code, re.S))
    found = []
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        sizes = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        body = bodies[name]
        products = tuple(re.findall(r"HGMMA[^;]*", body))
        depths = tuple(int(depth, 16) for depth in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", body))
        found.append(
            Kernel(
                name, sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"], _opcodes(body), products, depths
            )
        )
    return found


def _opcodes(body: str) -> collections.Counter[str]:
    return collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.a-z]*)", body, re.M))


@functools.cache
def _program(name: str) -> str:
    """cuobjdump and nvdisasm stand in Triton's wheel, and in a full CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    wheel = Path(str(spec.origin)).parent / "backends/nvidia/bin" / name if spec else None
    found = str(wheel) if wheel is not None and wheel.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, which comes with Triton and with the CUDA toolkit")
    return found


def _tool(name: str, *arguments: str, folder: Path | None = None) -> str:
    program = _program(name)
    path = f"{Path(program).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump calls nvdisasm
    done = subprocess.run(
        [program, *arguments], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
