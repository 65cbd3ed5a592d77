"""Bad input: the argument, what was wanted, what was given and the way out, before any work is done."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from memvp_kernels import fused_ffn, ops
from tests import cases

F32 = torch.float32


def z(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def i(*values: int) -> torch.Tensor:
    return torch.tensor(values)


# what changes on a good call (S=3, T=5, d=24, F=40, R=3, M=7), the exception, and what its text must say
CASES: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    ("x_array", {"x": np.zeros((3, 5, 24))}, TypeError, ["x: wanted a torch.Tensor", "ndarray", "as_tensor"]),
    ("x_integers", {"x": z(3, 5, 24, dtype=torch.int64)}, TypeError, ["x: wanted float32", "int64", "cast"]),
    ("x_scalar", {"x": z()}, ValueError, ["x: wanted shape", "()"]),
    ("key_dtype", {"key": z(40, 24, dtype=torch.bfloat16)}, TypeError, ["key: wanted x's dtype", "bfloat16", "autocast"]),
    ("residual_dtype", {"residual": z(3, 5, 24, dtype=torch.float16)}, TypeError, ["residual: wanted x's dtype", "float16"]),
    ("memory_narrower", {"visual_key": z(3, 7, 24, dtype=torch.float16)}, TypeError, ["visual_key: wanted", "or a wider one", "float16"]),
    ("index_floats", {"visual_index": z(3)}, TypeError, ["visual_index: wanted int32 or int64", "float32"]),
    ("key_width", {"key": z(40, 23)}, ValueError, ["key: wanted shape (F, 24)", "(40, 23)"]),
    ("key_dims", {"key": z(40)}, ValueError, ["key: wanted shape", "(40,)"]),
    ("value_not_transposed", {"value": z(24, 40)}, ValueError, ["value: wanted shape (40, 24)", "(24, 40)", "down_proj.weight.T"]),
    ("gate_shape", {"gate": z(41, 24)}, ValueError, ["gate: wanted shape (40, 24)", "(41, 24)"]),
    ("key_bias_shape", {"key_bias": z(24)}, ValueError, ["key_bias: wanted shape (40,)", "(24,)"]),
    ("value_bias_shape", {"value_bias": z(40)}, ValueError, ["value_bias: wanted shape (24,)", "(40,)"]),
    ("value_missing", {"value": None}, ValueError, ["key: needs value", "both or neither"]),
    ("key_missing", {"key": None}, ValueError, ["value: needs key"]),
    ("gate_without_key", {"key": None, "value": None}, ValueError, ["gate: needs key"]),
    ("gate_bias_without_gate", {"gate": None, "gate_bias": z(40)}, ValueError, ["gate_bias: needs gate"]),
    ("visual_value_missing", {"visual_value": None}, ValueError, ["visual_key: needs visual_value"]),
    ("visual_key_missing", {"visual_key": None}, ValueError, ["visual_value: needs visual_key"]),
    ("positions_alone", {"visual_key": None, "visual_value": None}, ValueError, ["key_position: needs visual_key"]),
    (
        "nothing",
        dict.fromkeys(("key", "value", "gate", "visual_key", "visual_value", "key_position", "value_position")),
        ValueError,
        ["got neither", "nothing to compute"],
    ),
    ("visual_width", {"visual_key": z(3, 7, 9), "visual_value": z(3, 7, 9)}, ValueError, ["visual_key: wanted", "24", "(3, 7, 9)", "visual_basis"]),
    ("visual_value_shape", {"visual_value": z(3, 8, 24)}, ValueError, ["visual_value: wanted shape (3, 7, 24)", "(3, 8, 24)"]),
    ("basis_width", {"visual_basis": z(24, 23)}, ValueError, ["visual_basis: wanted shape (r, 24)", "(24, 23)"]),
    ("core_rank", {"visual_basis": z(9, 24)}, ValueError, ["visual_key: wanted shape cores", "last dimension 9", "(3, 7, 24)"]),
    ("position_shape", {"key_position": z(1, 7, 24)}, ValueError, ["key_position: wanted shape (7, 24)", "(1, 7, 24)", "squeeze"]),
    ("lengths_shape", {"visual_lengths": i(7, 7)}, ValueError, ["visual_lengths: wanted shape (3,)", "(2,)"]),
    ("index_shape", {"visual_index": i(0, 1)}, ValueError, ["visual_index: wanted shape (3,)", "(2,)"]),
    ("rows_and_sequences", {"x": z(4, 5, 24)}, ValueError, ["visual_key: wanted shape (4, M", "(3, 7, 24)", "visual_index"]),
    ("no_sequences_in_x", {"x": z(15, 24)}, ValueError, ["visual_key: memory per sequence", "cu_seqlens", "(15, 24)"]),
    ("four_dimensions", {"x": z(1, 3, 5, 24)}, ValueError, ["visual_key: memory per sequence", "(1, 3, 5, 24)"]),
    ("residual_shape", {"residual": z(5, 24)}, ValueError, ["residual: wanted shape (3, 5, 24)", "(5, 24)"]),
    ("packed_with_three_dimensions", {"cu_seqlens": i(0, 15)}, ValueError, ["cu_seqlens: wanted a packed x", "(3, 5, 24)"]),
    ("packed_shape", {"x": z(15, 24), "cu_seqlens": z(2, 2, dtype=torch.int32)}, ValueError, ["cu_seqlens: wanted shape (S + 1,)", "(2, 2)"]),
    ("activation", {"activation": "swish"}, ValueError, ["activation: wanted one of relu, gelu, gelu_tanh, silu", "'swish'"]),
    ("visual_activation", {"visual_activation": "softmax"}, ValueError, ["visual_activation: wanted one of", "'softmax'"]),
    ("backend", {"backend": "cudnn"}, ValueError, ["backend: wanted one of auto, torch, triton, cuda", "'cudnn'"]),
    ("dropout_range", {"dropout_p": 1.5}, ValueError, ["dropout_p: wanted a probability in [0, 1]", "1.5"]),
    ("dropout_nan", {"dropout_p": float("nan")}, ValueError, ["dropout_p", "nan"]),
    ("dropout_type", {"dropout_p": "0.1"}, TypeError, ["dropout_p: wanted a Python number", "str"]),
    ("scale_tensor", {"visual_scale": torch.tensor(0.1)}, TypeError, ["visual_scale: wanted a Python number", "Tensor"]),
    ("recompute", {"recompute": 1}, TypeError, ["recompute: wanted a bool", "int"]),
    ("device", {"key": torch.zeros(40, 24, device="meta")}, ValueError, ["key: wanted a tensor on x's device cpu", "meta", ".to(x.device)"]),
    ("index_high", {"visual_index": i(0, 3, 1)}, ValueError, ["visual_index: wanted values in -1..2", "got 0..3"]),
    ("index_low", {"visual_index": i(0, -2, 1)}, ValueError, ["visual_index: wanted values in -1..2", "got -2..1"]),
    ("index_wraps", {"visual_index": i(0, 2**32, 1)}, ValueError, ["visual_index: wanted values in -1..2"]),
    ("lengths_high", {"visual_lengths": i(7, 8, 0)}, ValueError, ["visual_lengths: wanted values in 0..7", "got 0..8"]),
    ("lengths_low", {"visual_lengths": i(7, -1, 0)}, ValueError, ["visual_lengths: wanted values in 0..7", "-1..7"]),
]  # fmt: skip
PACKED = [
    ("end", i(0, 4, 9, 14), "14"),
    ("start", i(1, 4, 9, 15), "[1, 4, 9, 15]"),
    ("falling", i(0, 9, 4, 15), "[0, 9, 4, 15]"),
]


def good() -> dict[str, Any]:
    return cases.build("one_each-plain", F32)


@pytest.mark.parametrize(("change", "error", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_each_error(change: dict[str, Any], error: type[Exception], said: list[str], grad: bool) -> None:
    a = good() | change
    if grad and isinstance(a["visual_value"], torch.Tensor):
        a["visual_value"] = a["visual_value"].clone().requires_grad_()
    with pytest.raises(error, match=re.escape(said[0])) as caught:
        fused_ffn(**a)
    assert type(caught.value) is error
    assert all(s in str(caught.value) for s in said), str(caught.value)


@pytest.mark.parametrize(("offsets", "said"), [c[1:] for c in PACKED], ids=[c[0] for c in PACKED])
def test_packed_offsets(offsets: torch.Tensor, said: str) -> None:
    a = good() | {"x": z(15, 24), "cu_seqlens": offsets}
    with pytest.raises(ValueError, match=r"cu_seqlens: wanted offsets rising from 0 to N = 15") as caught:
        fused_ffn(**a)
    assert said in str(caught.value)


def test_nothing_ran_before_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(ops, "choose", forbidden)
    for _, change, error, _ in CASES:
        with pytest.raises(error):
            fused_ffn(**(good() | change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backends exist")
def test_backends_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"backend: wanted 'triton', but .*; backend='auto'"):
        fused_ffn(**good(), backend="triton")
    with pytest.raises(RuntimeError, match=r"backend: wanted 'cuda', but .*; backend='auto'"):
        fused_ffn(**good(), backend="cuda")


def test_nan_and_inf_propagate() -> None:
    a = good()
    a["x"][1, 2, 3] = float("nan")
    out = fused_ffn(**a)
    assert out[1, 2].isnan().all()
    assert torch.isfinite(out[0]).all()
    assert torch.isfinite(out[1, 1]).all()


def test_slots_past_the_length_are_never_read() -> None:
    a = cases.build("lengths-plain", F32)
    for name in ("visual_key", "visual_value"):
        for row, length in enumerate(a["visual_lengths"].tolist()):
            a[name][row, length:] = float("nan")
    bound = {n: v.requires_grad_() if n.startswith("visual_") and v.is_floating_point() else v for n, v in a.items()}
    out = fused_ffn(**bound)
    assert torch.isfinite(out).all()
    for g in torch.autograd.grad(out.sum(), [bound["visual_key"], bound["visual_value"]]):
        assert torch.isfinite(g).all()
        assert g[0].abs().sum() == 0
        assert g[2, 4:].abs().sum() == 0
        assert g[2, :4].abs().sum() > 0
