"""The GPU machine's run: order, limits, and what is left when a part hangs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_report
import pytest
import sanitized
from gpu_report import Part
from harness.results import load


def python(code: str) -> gpu_report.Callable[[Path, int], list[str]]:
    return lambda results, seconds: [sys.executable, "-c", code, str(results)]


def test_the_whole_run_fits_nine_minutes_and_begins_with_the_build() -> None:
    parts = gpu_report.parts("cuda")
    assert sum(part.seconds for part in parts) < 9 * 60
    names = [part.name for part in parts]
    assert names[0] == "build"
    assert (
        names.index("tests")
        < names.index("sanitizer")
        < names.index("kernels")
        < names.index("latency")
        < names.index("training")
    )
    for part in parts:
        if part.name in ("kernels", "latency", "training"):
            command = part.command(Path("r"), part.seconds)
            limit = float(command[command.index("--seconds") + 1])
            assert limit < part.seconds  # what it began, it can finish
            assert "llama-7b" in command


def test_a_hanging_part_is_stopped_and_what_it_wrote_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrote = "import sys, time, pathlib; pathlib.Path(sys.argv[1], 'partial.json').write_text('rows'); print('begun', flush=True); "
    parts = [
        Part("hangs", 2, python(wrote + "time.sleep(60)")),
        Part("absent", 5, python(""), lambda: "not installed: something"),
        Part("fails", 5, python("print('why it failed'); raise SystemExit(3)")),
        Part("works", 5, python("import os; print(os.environ['MARK'])"), variables={"MARK": "seen"}),
    ]
    monkeypatch.setattr(gpu_report, "parts", lambda device: parts)
    assert gpu_report.main(["--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "gpu-report-summary.json").read_text())
    assert [line["status"] for line in summary] == ["stopped after 2 s", "skipped", "exit status 3", "ok"]
    assert summary[1]["reason"] == "not installed: something"
    assert summary[0]["seconds"] < 10
    assert (tmp_path / "partial.json").read_text() == "rows"
    log = (tmp_path / "gpu-report.log").read_text()
    assert "begun" in log
    assert "seen" in log
    assert "why it failed" in capsys.readouterr().out  # the end of every part reaches the terminal


def test_nothing_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "parts", lambda device: [Part("late", 5, python("raise SystemExit(3)"))])
    assert gpu_report.main(["--out", str(tmp_path), "--total", "1"]) == 0
    summary = json.loads((tmp_path / "gpu-report-summary.json").read_text())
    assert summary[0]["reason"] == "the run's time is up"


def test_the_kernels_part_runs_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program by the road of the GPU run, every Triton launch by the interpreter: a changed launcher shows here, not there."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_report.main(["--device", "cpu", "--only", "kernels", "--out", str(tmp_path)]) == 0
    document = load(tmp_path / "kernels.json")
    assert [row["status"] for row in document["rows"] if row["variant"] == "triton"] == ["ok"] * 5
    assert document["environment"]["triton_interpreted"] is True


def test_the_sanitized_calls_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitized.main(["--device", "cpu", "--backends", "torch", "cuda"]) == 0
    assert capsys.readouterr().out.count(": ok") == 4
