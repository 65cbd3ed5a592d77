"""Machine code of what only some shapes take: loops cut into parts, the sum of the parts, and the library road's passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Run where Triton compiles, so in a process of its own.
_PROGRAM = """
import dataclasses, sys
sys.path.insert(0, "benchmarks")
import torch
from unittest import mock
from harness.machine_code import inspect, offline
from memvp_kernels.backends.triton import backward_tiles, pointwise, tiles
from memvp_kernels.backends.triton.dinput import dinput_backward
from memvp_kernels.backends.triton.output import output_forward
from memvp_kernels.problem import Segments

architecture = int(sys.argv[1])
chip, bf16 = tiles.chip_of(architecture), torch.bfloat16
N, d, F, M = 512, 2048, 5632, 456
matrix = {"wgmma": "HGMMA", "tcgen05": "UTC"}.get(chip.family, "HMMA")


def empty(*shape, dtype=bf16):
    return torch.empty(*shape, dtype=dtype)


x, hidden, pre = empty(N, d), empty(N, F), empty(2, N, F)
key, gate, value, memory, left = empty(F, d), empty(F, d), empty(d, F).T, empty(1, M, d), empty(N, M + 8)[:, :M]
shared, packed = Segments(N, 1, N, shared=True), Segments(N, 3, None, cu_seqlens=torch.empty(4, dtype=torch.int32))
single = list(tiles.candidates(chip, bf16, "ieee", descriptors=architecture >= 90))
double = set(tiles.candidates(chip, bf16, "ieee", descriptors=architecture >= 90, accumulators=2))
count = 0
for tile in single:
    cut = dataclasses.replace(tile, splits=4)
    for segments in (shared, packed) if tile in double else (shared,):
        with (
            mock.patch.object(tiles, "output_tile", return_value=cut),
            mock.patch.object(backward_tiles, "dinput_tile", return_value=backward_tiles._shorter_steps(cut, bf16, architecture >= 90)),
            offline(architecture) as launched,
        ):
            output_forward(hidden, value, empty(d, dtype=torch.float32), left, memory, segments, x, x)
            dinput_backward(pre, key, gate, left, memory, segments, x)
            pointwise.form_hidden(pre, "gelu_tanh")
            pointwise.form_dpre(hidden, pre, pre, "gelu_tanh")
        assert {l.name for l in launched} == {
            "output_fwd_kernel", "dinput_bwd_kernel", "add_parts_kernel", "form_hidden_kernel", "form_dpre_kernel"}
        for l in launched:
            machine = inspect(l.kernel)
            what = f"sm_{architecture} {l.name}, {cut}, {'packed' if segments is packed else 'dense'}: {machine}"
            assert machine.stack == machine.spills == 0, what
            assert machine.shared <= chip.shared, what
            if l.name in ("output_fwd_kernel", "dinput_bwd_kernel"):
                assert l.programs == -(-N // tile.block_n) * -(-d // tile.columns) * 4, what
                if tile.block_n >= 64:
                    assert any(operation.startswith(matrix) for operation in machine.matrix), what
                    assert not any(loop.serialised for loop in machine.loops), what
            if "--print" in sys.argv:
                print(what)
            count += 1
print(count, "launches")
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_no_spill_and_a_pipeline(architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(architecture)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
