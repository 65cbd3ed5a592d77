"""The extension's machine code in the report: what another reader of the same library finds, and a reason where there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
import machine_report
from harness.extension_code import extension_kernels

from memvp_kernels.backends.cuda import extension
from tests.csrc import machine_code


@pytest.fixture(scope="module")
def library() -> Path:
    built = extension.load()
    if built is None:
        pytest.skip("the extension was not built here")
    return Path(str(built.__file__))


def test_it_reads_what_is_there(library: Path, tmp_path: Path) -> None:
    found = extension_kernels(90)
    others = [k for path in machine_code.cubins(library, tmp_path)["sm_90a"] for k in machine_code.kernels(path)]
    assert len(found) == len(others) > 20
    assert sorted((m.registers, m.stack, sum(m.matrix.values()), m.tensor_loads) for m in found.values()) == sorted(
        (k.registers, k.stack, k.count("HMMA") + k.count("HGMMA"), k.count("UTMALDG")) for k in others
    )
    assert "ffn_step_kernel<BFloat16, (StepKind)0, true>" in found
    assert all(" " not in name.split("<")[0] for name in found)


def test_the_program_prints_it(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_report.main(["--extension"]) == 0
    printed = capsys.readouterr()
    assert "HGMMA.64x256x16" in printed.out
    assert printed.err == ""


def test_a_reason_where_there_is_none(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for built, reason in ((None, "was not built"), (SimpleNamespace(__file__=__file__, archs="80"), "not for sm_90")):
        monkeypatch.setattr(extension, "load", lambda built=built: built)
        monkeypatch.setattr("harness.extension_code.tool", lambda *arguments, folder=None: "")
        assert machine_report.main(["--extension"]) == 1
        assert reason in capsys.readouterr().err
