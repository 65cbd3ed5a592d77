"""Every Triton kernel compiled for GPUs that are not here: no spill, the right matrix instruction, wgmma that overlap, memory that fits.

Compiling needs a process in which Triton does not interpret, so each architecture has one of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from memvp_kernels.backends import triton as backend
from tests.machine_code.checks import KERNELS, Row, complaints
from tests.machine_code.launches import NUMBERS
from tests.machine_code.sass import Kernel, Loop

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100, 120)


def check(architecture: int, *options: str) -> None:
    if architecture == 120 and triton.__version__.startswith("3.6."):
        pytest.skip(
            "Triton 3.6's assembler spills 8 bytes on sm_120 in every kernel that loads by TMA; 3.7 and 3.9 don't"
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.machine_code", "--architecture", str(architecture), *options]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_with_its_widest_tile(architecture: int) -> None:
    check(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile(architecture: int, number: str) -> None:
    check(architecture, "--all", "--number", number)


def test_no_kernel_is_forgotten() -> None:
    found = pkgutil.walk_packages(backend.__path__, f"{backend.__name__}.")
    modules = [importlib.import_module(m.name) for m in found]
    assert {name for module in modules for name in vars(module) if name.endswith("_kernel")} == set(KERNELS)


_HGMMA = "HGMMA.64x256x16.F32.BF16"


def code(*matrix: str, before: str = "S2R ACQBULK UTMALDG") -> tuple[tuple[str, str], ...]:
    return tuple((opcode, "") for opcode in (*before.split(), *matrix, "STG"))


_MACHINE = Kernel("", 180, 0, 0, 0, code(_HGMMA), (Loop(4, 1),))
_ROW = Row("hidden_fwd_kernel", "plain", 90, "bfloat16", (128, 128, 64), True, True, _MACHINE, 128 * 1024, 0, True)


def changed(row: Row, **changes: Any) -> list[str]:
    """The complaints about this launch, were it or its machine code different."""
    of_row = {name: value for name, value in changes.items() if name in vars(row)}
    of_machine = {name: value for name, value in changes.items() if name not in of_row}
    assert row.machine is not None
    return complaints(dataclasses.replace(row, **{"machine": dataclasses.replace(row.machine, **of_machine), **of_row}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "spills"),
        ({"code": code(_HGMMA, "LDL")}, "spills"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"tensor_memory": 1024}, "tensor memory"),
        ({"code": code("HMMA.16816.F32.BF16")}, "wanted HGMMA, found HMMA"),
        ({"code": code(_HGMMA, "HMMA.16816.F32.BF16")}, "wanted HGMMA, found HMMA"),
        ({"code": code("HGMMA.64x256x8.F32.TF32")}, "wanted HGMMA, found HGMMA.64x256x8.F32.TF32"),
        ({"code": code()}, "no matrix instruction at all"),
        ({"architecture": 100}, "wanted UTCHMMA, found HGMMA"),
        ({"tile": (16, 64, 64)}, "wanted HMMA, found HGMMA"),
        ({"dtype": "tf32"}, "wanted HGMMA, found HGMMA.64x256x16.F32.BF16"),
        ({"dtype": "float32"}, "wanted no matrix instruction, found HGMMA"),  # where the user asked for IEEE
        ({"loops": (Loop(4, 4),)}, "serialised"),
        ({"loops": ()}, "no loop"),
        ({"code": code(_HGMMA, before="ACQBULK LDG")}, "TMA"),
        ({"code": code(_HGMMA, before="UTMALDG ACQBULK")}, "launch before it"),
        ({"code": code(_HGMMA, before="UTMALDG")}, "launch before it"),
        ({"pdl": False}, "launch before it"),
        ({"machine": None, "error": "RuntimeError: PassManager::run failed"}, "PassManager"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checks_notice(change: dict[str, Any], words: str) -> None:
    """Each complaint appears for machine code that deserves it, and for no other."""
    assert complaints(_ROW) == []
    (found,) = changed(_ROW, **change)
    assert words in found
