"""The emulation's own data layouts, against the formulas of the PTX ISA."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.emulate_decode import ROOT, compile_emulation, compiler


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_layouts(tmp_path: Path) -> None:
    program = tmp_path / "layouts"
    how = ("-O1", "-fsanitize=address", "-Wno-psabi", "-Wno-parentheses")
    compile_emulation(ROOT / "tests" / "csrc" / "layouts_test.cpp", program, *how)
    done = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
