"""The Triton backend through the public function on every named case: output and every gradient against float64, by the 2x rule."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import fused_ffn, philox
from tests import cases, tolerance
from tests.cases import DEVICE

run = functools.partial(fused_ffn, backend="triton")
pytestmark = pytest.mark.device
# On a GPU each number type of these cases is 140 kernels to compile.
_RARER = () if DEVICE.type == "cpu" else pytest.mark.slow


# float16 differs from bfloat16 in its rounding alone.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in cases.names()),
        *(pytest.param(name, torch.float32, marks=_RARER) for name in cases.names()),
        *(pytest.param(name, torch.float16, marks=_RARER) for name in cases.names()[::7]),
    ],
    ids=str,
)
def test_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_layouts(form: str) -> None:
    a = cases.build(f"one_each-{form}", torch.bfloat16, DEVICE)
    layouts = dict(cases.strided(a))
    for which in ("x_transposed", "key_every_second", "visual_key_transposed", "key_position_every_second"):
        tolerance.check(run, layouts[which])


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_dropout_is_the_same_philox_forward_and_backward(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = dict(cases.build(f"index-{form}", torch.bfloat16, DEVICE), dropout_p=0.4)
    seed = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
    monkeypatch.setattr("memvp_kernels.autograd.draw_seed", lambda device: seed)
    rows, slots = a["x"].shape[0] * a["x"].shape[1], a["visual_key"].shape[1]
    tolerance.check(run, a, keep=philox.keep_mask(seed, rows, slots, 0.4))


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_a_dropped_nan_is_still_one(form: str) -> None:
    a = dict(cases.build(f"lengths-{form}", torch.float32, DEVICE), dropout_p=1.0)  # 0, 7 and 4 of 7 slots
    a["x"][2, 1, 3] = float("nan")
    a["key"] = a["value"] = a["gate"] = None
    out, grads = tolerance.gradients(run, a, ["x", "visual_key"], torch.ones_like(a["x"]))
    assert out[2, 1].isnan().all()
    assert out.isnan().sum() == 24
    assert grads["x"][2, 1].isnan().all()
    assert grads["visual_key"][2, :4].isnan().any()
    assert grads["visual_key"][2, 4:].abs().sum() == 0
