"""The GPU machine's run: its order and limits, and what is left when a part hangs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import gpu_report
from tools.gpu_report import Part


def test_the_whole_run_fits_and_what_decides_comes_first(tmp_path: Path) -> None:
    parts = gpu_report.parts(tmp_path, rehearse=False)
    assert sum(part.seconds for part in parts) <= gpu_report.TOTAL
    names = [part.name for part in parts]
    assert names[:5] == ["build", "diagnosis", "smoke", "tests-llama", "decode"]
    assert len(set(names)) == len(names) == len(gpu_report.parts(tmp_path, rehearse=True))
    for part in parts:
        for word in part.command.split():
            if word.endswith(".py"):
                assert (gpu_report.ROOT / word.removeprefix("--ignore=")).exists(), f"{part.name}: {word}"


def test_a_part_that_hangs_or_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [
        Part("hangs", 3, "-c 'import time; print(\"here\", flush=True); time.sleep(600)'"),
        Part("fails", 30, "-c 'import sys; sys.exit(3)'"),
        Part("again", 30, "-c 'import sys; sys.exit(0 if \"--continue\" in sys.argv else 75)'"),
        Part("absent", 30, "-c 1", ("a_package_that_nobody_has",)),
    ]
    monkeypatch.setattr(gpu_report, "parts", lambda out, rehearse: parts)
    monkeypatch.setattr(gpu_report, "GRACE", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path)])
    assert gpu_report.main() == 1
    said = [line.rsplit(" (", 1)[0].split(maxsplit=1) for line in capfd.readouterr().out.splitlines()[-4:]]
    assert said == [
        ["hangs", "STOPPED after 3 s"],
        ["fails", "FAILED with exit status 3"],
        ["again", "ok"],
        ["absent", "skipped, not here: a_package_that_nobody_has"],
    ]
    assert "here" in (tmp_path / "log.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "summary.txt"}
