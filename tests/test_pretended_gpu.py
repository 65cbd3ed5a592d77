"""The tests that a GPU machine selects leave no tensor on the CPU, and its programs start: seen here on a pretended GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def test_every_gpu_test_puts_its_tensors_on_the_device() -> None:
    pytest_once = ("-m", "pytest", "-q", "-p", "tests.pretended_gpu", "-p", "no:cacheprovider", "--tb=short")
    places = ["tests/operator", "tests/triton", "tests/cuda", "tests/csrc/test_decode_gpu.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *pytest_once, "-m", "gpu and not slow", *places],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
