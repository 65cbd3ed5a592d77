"""Every kernel compiled for GPUs that are not here: no spill, the right matrix instruction, wgmma that overlap, shared memory that fits.

Compiling needs a process in which Triton does not interpret, so the report program runs in one of its own. Cubins stay in Triton's
cache: a second run reads them there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.machine_cases import NUMBERS
from harness.machine_checks import GLUON_KERNELS, KERNELS, Row, complaints
from harness.machine_code import Loop, Machine, waits_first

from memvp_kernels.backends import triton as backend

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = (80, 90, 100)


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


def row_of(found: dict[str, Any]) -> Row:
    machine = dict(found["machine"], loops=tuple(Loop(**loop) for loop in found["machine"]["loops"]))
    return Row(**dict(found, machine=Machine(**machine)))


def planted(row: Row, **changes: Any) -> list[str]:
    """The complaints about this kernel had its machine code been different."""
    assert row.machine is not None
    return complaints(dataclasses.replace(row, machine=dataclasses.replace(row.machine, **changes)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_with_its_widest_tile(architecture: int, tmp_path: Path) -> None:
    found = report(architecture, tmp_path / "report.json")
    assert found["complaints"] == []
    rows = [row_of(row) for row in found["rows"]]
    assert {row.kernel for row in rows} == {*KERNELS, *(GLUON_KERNELS if architecture == 90 else ())}
    for row in rows:
        # The checks reach each of them: with other machine code it would not have passed.
        assert row.machine is not None
        assert planted(row, matrix={"IMMA.16816.S8.S8": 1})
        assert not row.multiplies or planted(row, matrix={})
        loops = tuple(dataclasses.replace(loop, waits=loop.matrix) for loop in row.machine.loops)
        pipelined = any(loop.matrix > 1 for loop in loops)
        assert pipelined == any("serialised" in found for found in planted(row, loops=loops))
        assert pipelined or not row.multiplies or architecture != 90


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile(architecture: int, number: str, tmp_path: Path) -> None:
    found = report(architecture, tmp_path / "report.json", "--all", "--number", number)
    assert found["complaints"] == []
    assert {row["kernel"] for row in found["rows"]} >= set(KERNELS) - {"form_hidden_kernel"}


def test_no_kernel_is_forgotten() -> None:
    found = pkgutil.walk_packages(backend.__path__, f"{backend.__name__}.")
    modules = [importlib.import_module(m.name) for m in found]
    assert {name for module in modules for name in vars(module) if name.endswith("_kernel")} == {
        *KERNELS,
        *GLUON_KERNELS,
    }


_HIDDEN = Row(
    "hidden_fwd_kernel", "plain", 90, "bfloat16", 128, 128, 64, 4, True, True, 132, 1.0, None,
    Machine(180, 0, 0, 128 * 1024, 8, {"HGMMA.64x256x16.F32.BF16": 4}, 8, 0, (Loop(90, 4, 1, 1),), True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "spills"),
        ({"spills": 2}, "spills"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"tensor_memory": 1024}, "tensor memory"),
        ({"matrix": {"HMMA.16816.F32.BF16": 4}}, "wanted HGMMA, found HMMA"),
        ({"matrix": {"HGMMA.64x256x16.F32.BF16": 4, "HMMA.16816.F32.BF16": 4}}, "wanted HGMMA, found HMMA"),
        ({"matrix": {"HGMMA.64x256x8.F32.TF32": 4}}, "wanted HGMMA, found HGMMA.64x256x8.F32.TF32"),
        ({"matrix": {}}, "no matrix instruction at all"),
        ({"loops": (Loop(90, 4, 4, 0),)}, "serialised"),
        ({"loops": ()}, "no loop"),
        ({"tensor_loads": 0}, "TMA"),
        ({"follows": False}, "launch before it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checks_notice(change: dict[str, Any], words: str) -> None:
    """Each complaint appears for machine code that deserves it, and for no other."""
    assert complaints(_HIDDEN) == []
    (found,) = planted(_HIDDEN, **change)
    assert words in found


def test_what_orders_its_own_products_is_held_to_more() -> None:
    """One instruction across the tile, as of two separate weights, and one group in flight."""
    gluon = dataclasses.replace(_HIDDEN, kernel="gluon_hidden_kernel", accumulated=256)
    assert complaints(gluon) == []
    (found,) = planted(gluon, matrix={"HGMMA.64x128x16.F32.BF16": 8})
    assert "one instruction for all 256 columns" in found
    (found,) = planted(gluon, loops=(Loop(50, 4, 1, 0),))
    assert "awaited" in found


@pytest.mark.parametrize(
    ("row", "good", "wrong"),
    [
        # dmemory has no rows of x in its tile: slots stand there.
        ({"kernel": "dmemory_bwd_kernel", "rows": 64}, "HGMMA.64x256x16.F32.BF16", "HMMA.16816.F32.BF16"),
        ({"kernel": "core_fwd_kernel", "rows": 16}, "HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32.BF16"),
        ({"architecture": 80, "rows": 16, "descriptors": False}, "HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32"),
        ({"architecture": 100, "rows": 128}, "UTCHMMA", "HMMA.16816.F32.BF16"),
        ({"dtype": "tf32"}, "HGMMA.64x128x8.F32.TF32", "FFMA"),
        ({"dtype": "tf32", "architecture": 80, "descriptors": False}, "HMMA.1688.F32.TF32", "HMMA.16816.F32"),
        ({"dtype": "float16"}, "HGMMA.64x256x16.F32", "HGMMA.64x256x16.F32.BF16"),
    ],
)
def test_the_instruction_goes_by_the_product_alone(row: dict[str, Any], good: str, wrong: str) -> None:
    """Whatever was found decides nothing: another instruction is a complaint for every kernel, tile and number type."""
    expecting = dataclasses.replace(_HIDDEN, **row)
    assert planted(expecting, matrix={good: 4}) == []
    assert planted(expecting, matrix={wrong: 4})
    assert planted(expecting, matrix={})
    serialised = planted(expecting, matrix={good: 4}, loops=(Loop(90, 4, 4, 0),))
    assert len(serialised) == 1
    assert "serialised" in serialised[0]


@pytest.mark.parametrize(
    ("operations", "first"),
    [("S2R ACQBULK PREEXIT LDG STG", True), ("S2R LDG ACQBULK STG", False), ("UTMALDG ACQBULK", False), ("S2R LDG STG", False)],
)  # fmt: skip
def test_a_kernel_that_may_begin_early_waits_before_it_touches_memory(operations: str, first: bool) -> None:
    assert waits_first(operations.split()) == first


def test_what_multiplies_nothing_needs_no_instruction() -> None:
    """The gradient of Vv alone asks dhidden for the visual activations, and for no product."""
    nothing = dataclasses.replace(_HIDDEN, kernel="dhidden_bwd_kernel", multiplies=False, descriptors=False)
    assert planted(nothing, matrix={}, loops=()) == []
    assert planted(nothing)


def test_ieee_float32_is_multiplied_as_such() -> None:
    """TF32 where the user asked for IEEE would be a wrong result."""
    exact = dataclasses.replace(_HIDDEN, dtype="float32", descriptors=False)
    assert planted(exact, matrix={}, loops=()) == []
    assert planted(exact, matrix={"HMMA.1688.F32.TF32": 4})


def test_what_does_not_compile_is_a_complaint() -> None:
    failed = dataclasses.replace(_HIDDEN, machine=None, error="RuntimeError: PassManager::run failed")
    (found,) = complaints(failed)
    assert "PassManager" in found
