"""The Triton backend through the public function on every named case: output and every gradient against float64, by the 2x rule."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import fused_ffn, philox
from tests import cases, yardstick

run = functools.partial(fused_ffn, backend="triton")


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_case(name: str, dtype: torch.dtype) -> None:
    yardstick.check(run, cases.build(name, dtype))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_layouts(form: str) -> None:
    a = cases.build(f"one_each-{form}", torch.bfloat16)
    layouts = dict(cases.strided(a))
    for which in ("x_transposed", "key_every_second", "visual_key_transposed", "key_position_every_second"):
        yardstick.check(run, layouts[which])


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_dropout_is_the_same_philox_forward_and_backward(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = dict(cases.build(f"index-{form}", torch.bfloat16), dropout_p=0.4)
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    monkeypatch.setattr("memvp_kernels.ffn.draw_seed", lambda device: seed)
    rows, slots = a["x"].shape[0] * a["x"].shape[1], a["visual_key"].shape[1]
    yardstick.check(run, a, keep=philox.keep_mask(seed, rows, slots, 0.4))
