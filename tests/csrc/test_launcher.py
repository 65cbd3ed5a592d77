"""The launchers' own code, csrc/decode/ffn_decode.cu and csrc/hopper/ffn_steps.cu, compiled for the CPU over a made-up CUDA runtime (fake_runtime/)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.host_run import ROOT, compile_host, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def test_launcher(tmp_path: Path) -> None:
    """What it launches early, sets and leaves behind; the program says what is wrong."""
    here = ROOT / "tests" / "csrc"
    program = tmp_path / "launcher"
    compile_host(here / "launcher_selftest.cpp", program, "-O1", "-pthread", "-Wno-psabi", f"-I{here / 'fake_runtime'}")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
