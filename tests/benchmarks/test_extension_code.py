"""The extension's machine code in the report: what another reader of the same library finds, and a reason where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import machine_report
from harness.extension_code import extension_kernels
from harness.machine_code import Machine

from memvp_kernels.backends.cuda import extension
from tests.csrc import machine_code


@pytest.fixture(scope="module")
def library() -> Path:
    built = extension.load()
    if built is None:
        pytest.skip("the extension was not built here")
    return Path(str(built.__file__))


@pytest.fixture(scope="module")
def found(library: Path) -> dict[str, Machine]:
    return extension_kernels(90)


def test_it_reads_what_is_there(library: Path, found: dict[str, Machine], tmp_path: Path) -> None:
    others = [k for path in machine_code.cubins(library, tmp_path)["sm_90a"] for k in machine_code.kernels(path)]
    assert len(found) == len(others) > 20
    assert sorted((m.registers, m.stack, sum(m.matrix.values()), m.tensor_loads) for m in found.values()) == sorted(
        (k.registers, k.stack, k.count("HMMA") + k.count("HGMMA"), k.count("UTMALDG")) for k in others
    )
    assert "ffn_step_kernel<BFloat16, (StepKind)0, true>" in found
    assert all(" " not in name.split("<")[0] for name in found)


def test_the_program_prints_it_and_complains(
    found: dict[str, Machine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = dict(found)
    monkeypatch.setattr(machine_report, "extension_kernels", lambda architecture: shown)
    assert machine_report.main(["--extension"]) == 0
    printed = capsys.readouterr()
    assert "HGMMA.64x256x16" in printed.out
    assert printed.err == ""
    name, machine = next((n, m) for n, m in found.items() if n.startswith("ffn_step_kernel"))
    serial = tuple(dataclasses.replace(loop, waits=loop.matrix) for loop in machine.loops)
    for worse, words in (({"spills": 1}, "spills"), ({"loops": serial}, "serialised")):
        shown[name] = dataclasses.replace(machine, **worse)
        assert machine_report.main(["--extension"]) == 1
        assert f"{name}" in (said := capsys.readouterr().err)
        assert words in said


def test_a_reason_where_there_is_none(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for built, reason in ((None, "was not built"), (SimpleNamespace(__file__=__file__, archs="80"), "not for sm_90")):
        monkeypatch.setattr(extension, "load", lambda built=built: built)
        monkeypatch.setattr("harness.extension_code.tool", lambda *arguments, folder=None: "")
        assert machine_report.main(["--extension"]) == 1
        assert reason in capsys.readouterr().err
