"""The tree itself: no file that is too long to read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cu", ".cuh", ".h", ".cpp")
LONGEST = 400


def test_no_file_is_longer_than_400_lines() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(SOURCES)]
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files if path.exists()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}
