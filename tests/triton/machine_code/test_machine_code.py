"""Every kernel compiled for GPUs that are not here: no spill, the right matrix instruction, wgmma that overlap, shared memory that fits.

Compiling needs a process in which Triton does not interpret, so the report program runs in one per architecture. Cubins stay in Triton's
cache: a second run reads them there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

# What the launchers of one training step, plain and factored, come to.
_KERNELS = {
    "hidden_fwd_kernel",
    "output_fwd_kernel",
    "core_fwd_kernel",
    "dhidden_bwd_kernel",
    "dinput_bwd_kernel",
    "dmemory_bwd_kernel",
}


def report(architecture: int, into: Path, *options: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, str(ROOT / "benchmarks" / "machine_report.py"), "--architecture", str(architecture)]
    done = subprocess.run(
        [*program, "--json", str(into), *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert into.exists(), f"the report ended with {done.returncode}:\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads(into.read_text())
    return found


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_of_a_training_step(architecture: int, tmp_path: Path) -> None:
    found = report(architecture, tmp_path / "report.json")
    assert found["complaints"] == []
    assert {row["kernel"] for row in found["rows"]} >= _KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_every_tile_in_every_dtype(architecture: int, tmp_path: Path) -> None:
    found = report(architecture, tmp_path / "report.json", "--all")
    assert found["complaints"] == []


def test_the_checks_notice(tmp_path: Path) -> None:
    """Each complaint appears for machine code that deserves it; run where Triton compiles, so in its own process."""
    program = """
import dataclasses, sys
sys.path.insert(0, "benchmarks")
from harness.machine_cases import Row, complaints
from harness.machine_code import Loop, Machine
good = Row("hidden_fwd_kernel", "plain", 90, "bfloat16", 128, 128, 64, 4, 132, 1.0, None,
           Machine(180, 0, 0, 192 * 1024, 8, {"HGMMA.64x256x16.F32.BF16": 4}, 8, (Loop(90, 4, 1, 1),)))
assert complaints(good) == [], complaints(good)
for change, words in ((dict(stack=8), "spills"), (dict(spills=2), "spills"), (dict(shared=228 * 1024), "shared memory"),
                      (dict(matrix={"HMMA.16816.F32.BF16": 4}), "no HGMMA"), (dict(matrix={}), "no matrix instruction"),
                      (dict(loops=(Loop(90, 4, 4, 0),)), "serialised")):
    bad = dataclasses.replace(good, machine=dataclasses.replace(good.machine, **change))
    assert len(complaints(bad)) == 1 and words in complaints(bad)[0], (change, complaints(bad))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
