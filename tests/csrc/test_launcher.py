"""The launchers' own code, ffn_decode.cu and ffn_gemm.cu, compiled for the CPU over a made-up CUDA runtime (fake_runtime/)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.emulate_decode import ROOT, compile_emulation, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def test_launcher(tmp_path: Path) -> None:
    """What is launched, set and left behind; the program says what is wrong."""
    here = ROOT / "tests" / "csrc"
    program = tmp_path / "launcher"
    compile_emulation(
        here / "launcher_test.cpp", program, "-O1", "-pthread", "-Wno-psabi", f"-I{here / 'fake_runtime'}"
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
