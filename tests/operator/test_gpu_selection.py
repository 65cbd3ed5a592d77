"""Which tests a GPU machine runs: `-m gpu` takes the kernels' tests along, and each of them can be collected there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Files whose tests run on the GPU where there is one; the others compute on the CPU everywhere.
ON_DEVICE = {
    "operator/test_against_reference.py", "operator/test_dropout.py", "operator/test_memory_rows.py", "operator/test_on_gpu.py",
    "triton/test_backward.py", "triton/test_backward_needs.py", "triton/test_cases.py", "triton/test_device_code.py",
    "triton/test_forward.py", "triton/test_gluon.py", "triton/test_gpu.py", "triton/test_large.py",
}  # fmt: skip


def test_what_a_gpu_machine_selects() -> None:
    program = (
        "import sys, torch\n"
        "torch.cuda.is_available = lambda: True\n"  # this machine may have none: tests are only collected
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', '-m', 'gpu and not slow', *sys.argv[1:]]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, "tests/operator", "tests/triton"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    selected = {line.split(":")[0].removeprefix("tests/") for line in done.stdout.splitlines() if ".py:" in line}
    assert selected == ON_DEVICE
