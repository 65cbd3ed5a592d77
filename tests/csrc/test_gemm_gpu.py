"""The Hopper kernels on a GPU: right, and done in time. Whoever has a Hopper GPU runs them here first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.csrc.conftest import ROOT
from tests.csrc.gemm_on_gpu import MISSING

_SECONDS = 300  # of which Triton's compiler takes most


@pytest.mark.gpu
def test_right_and_never_hanging() -> None:
    command = [sys.executable, "-m", "tests.csrc.gemm_on_gpu"]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = program.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        program.kill()
        output, _ = program.communicate()
        pytest.fail(f"not done in {_SECONDS} s; it stopped in: {output.splitlines()[-1] if output else 'its imports'}")
    if program.returncode == MISSING:
        pytest.skip(output.splitlines()[-1])
    assert program.returncode == 0, output[-4000:]
