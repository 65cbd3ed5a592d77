"""Bad input: the argument, what was wanted, what was given and the way out, before any work is done."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from memvp_kernels import autograd, dispatch, fused_ffn, value_checks
from tests import cases, tolerance

F32 = torch.float32


def z(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def i(*values: int) -> torch.Tensor:
    return torch.tensor(values)


WITHOUT: dict[str, Any] = dict.fromkeys(("visual_key", "visual_value", "key_position", "value_position"))
EMPTY: dict[str, Any] = {
    "visual_key": z(3, 0, 24), "visual_value": z(3, 0, 24), "key_position": None, "value_position": None,
}  # fmt: skip

# what changes on a good call (S=3, T=5, d=24, F=40, R=3, M=7), the exception, and what its text must say
CASES: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    ("x_array", {"x": np.zeros((3, 5, 24))}, TypeError, ["x: wanted a torch.Tensor", "ndarray", "as_tensor"]),
    ("x_integers", {"x": z(3, 5, 24, dtype=torch.int64)}, TypeError, ["x: wanted float32", "int64", "cast"]),
    ("x_scalar", {"x": z()}, ValueError, ["x: wanted shape", "()"]),
    ("key_dtype", {"key": z(40, 24, dtype=torch.bfloat16)}, TypeError, ["key: wanted x's dtype", "bfloat16", "autocast"]),
    ("key_list", {"key": [[0.0] * 24] * 40}, TypeError, ["key: wanted a torch.Tensor or None", "list", "as_tensor"]),
    ("visual_key_array", {"visual_key": np.zeros((3, 7, 24))}, TypeError, ["visual_key: wanted a torch.Tensor", "ndarray"]),
    ("index_list", {"visual_index": [0, 1, 2]}, TypeError, ["visual_index: wanted a torch.Tensor", "list"]),
    ("residual_dtype", {"residual": z(3, 5, 24, dtype=torch.float16)}, TypeError, ["residual: wanted x's dtype", "float16"]),
    ("memory_narrower", {"visual_key": z(3, 7, 24, dtype=torch.float16)}, TypeError, ["visual_key: wanted", "or a wider one", "float16"]),
    ("index_floats", {"visual_index": z(3)}, TypeError, ["visual_index: wanted int32 or int64", "float32"]),
    ("lengths_dtype", {"visual_lengths": z(3, dtype=torch.int16)}, TypeError, ["visual_lengths: wanted int32 or int64", "int16", ".int()"]),
    ("offsets_dtype", {"cu_seqlens": z(4, dtype=torch.uint8)}, TypeError, ["cu_seqlens: wanted int32 or int64", "uint8", ".int()"]),
    ("key_width", {"key": z(40, 23)}, ValueError, ["key: wanted shape (F, 24)", "(40, 23)"]),
    ("key_dims", {"key": z(40)}, ValueError, ["key: wanted shape", "(40,)"]),
    ("value_not_transposed", {"value": z(24, 40)}, ValueError, ["value: wanted shape (40, 24)", "(24, 40)", "down_proj.weight.T"]),
    ("gate_shape", {"gate": z(41, 24)}, ValueError, ["gate: wanted shape (40, 24)", "(41, 24)"]),
    ("key_bias_shape", {"key_bias": z(24)}, ValueError, ["key_bias: wanted shape (40,)", "(24,)"]),
    ("gate_bias_shape", {"gate_bias": z(41)}, ValueError, ["gate_bias: wanted shape (40,)", "(41,)", "key-value pair"]),
    ("value_bias_shape", {"value_bias": z(40)}, ValueError, ["value_bias: wanted shape (24,)", "(40,)"]),
    ("value_missing", {"value": None}, ValueError, ["key: needs value", "both or neither"]),
    ("key_missing", {"key": None}, ValueError, ["value: needs key"]),
    ("gate_without_key", {"key": None, "value": None}, ValueError, ["gate: needs key"]),
    ("gate_bias_without_gate", {"gate": None, "gate_bias": z(40)}, ValueError, ["gate_bias: needs gate"]),
    ("visual_value_missing", {"visual_value": None}, ValueError, ["visual_key: needs visual_value"]),
    ("visual_key_missing", {"visual_key": None}, ValueError, ["visual_value: needs visual_key"]),
    ("positions_alone", {"visual_key": None, "visual_value": None}, ValueError, ["key_position: needs visual_key"]),
    ("value_position_alone", WITHOUT | {"value_position": z(7, 24)}, ValueError, ["value_position: needs visual_key", "got visual_key=None"]),
    ("basis_alone", WITHOUT | {"visual_basis": z(9, 24)}, ValueError, ["visual_basis: needs visual_key", "got visual_key=None"]),
    ("lengths_alone", WITHOUT | {"visual_lengths": i(7, 7, 7)}, ValueError, ["visual_lengths: needs visual_key", "got visual_key=None"]),
    ("index_alone", WITHOUT | {"visual_index": i(0, 1, 2)}, ValueError, ["visual_index: needs visual_key", "got visual_key=None"]),
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
    ("value_position_shape", {"value_position": z(7, 23)}, ValueError, ["value_position: wanted shape (7, 24)", "(7, 23)", "squeeze"]),
    ("lengths_shape", {"visual_lengths": i(7, 7)}, ValueError, ["visual_lengths: wanted shape (3,)", "(2,)"]),
    ("index_shape", {"visual_index": i(0, 1)}, ValueError, ["visual_index: wanted shape (3,)", "(2,)"]),
    ("rows_and_sequences", {"x": z(4, 5, 24)}, ValueError, ["visual_key: wanted shape (4, M", "(3, 7, 24)", "visual_index"]),
    ("no_sequences_in_x", {"x": z(15, 24)}, ValueError, ["visual_key: memory per sequence", "cu_seqlens", "(15, 24)"]),
    (
        "index_without_sequences",
        {"x": z(15, 24), "visual_key": z(7, 24), "visual_value": z(7, 24), "visual_index": i(0)},
        ValueError,
        ["visual_index: memory per sequence", "cu_seqlens", "(15, 24)"],
    ),
    ("four_dimensions", {"x": z(1, 3, 5, 24)}, ValueError, ["visual_key: memory per sequence", "(1, 3, 5, 24)"]),
    ("residual_shape", {"residual": z(5, 24)}, ValueError, ["residual: wanted shape (3, 5, 24)", "(5, 24)"]),
    ("packed_with_three_dimensions", {"cu_seqlens": i(0, 15)}, ValueError, ["cu_seqlens: wanted a packed x", "(3, 5, 24)"]),
    ("packed_shape", {"x": z(15, 24), "cu_seqlens": z(2, 2, dtype=torch.int32)}, ValueError, ["cu_seqlens: wanted shape (S + 1,)", "(2, 2)"]),
    ("activation", {"activation": "swish"}, ValueError, ["activation: wanted one of relu, gelu, gelu_tanh, silu", "'swish'"]),
    ("visual_activation", {"visual_activation": "softmax"}, ValueError, ["visual_activation: wanted one of", "identity", "'softmax'"]),
    ("activation_identity", {"activation": "identity"}, ValueError, ["activation: wanted one of relu, gelu, gelu_tanh, silu, got", "'identity'"]),
    ("visual_map", {"visual_map": "relu"}, ValueError, ["visual_map: wanted None or 'silu'", "'relu'"]),
    ("drop_range", {"visual_drop": 1.0}, ValueError, ["visual_drop: wanted a share in [0, 1)", "1.0", "0.0 drops nothing"]),
    ("drop_type", {"visual_drop": "0.1"}, TypeError, ["visual_drop: wanted a Python number", "str"]),
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
    ("index_into_shared", {"visual_key": z(7, 24), "visual_value": z(7, 24), "visual_index": i(0, 1, -1)}, ValueError, ["visual_index: wanted values in -1..0", "got -1..1"]),
    ("index_without_rows", {"visual_key": z(0, 7, 24), "visual_value": z(0, 7, 24), "visual_index": i(-1, 0, -1)}, ValueError, ["visual_index: wanted values in -1..-1", "got -1..0"]),
    ("index_without_slots", EMPTY | {"visual_index": i(7, 7, 7)}, ValueError, ["visual_index: wanted values in -1..2", "got 7..7"]),
    ("lengths_without_slots", EMPTY | {"visual_lengths": i(0, 1, 0)}, ValueError, ["visual_lengths: wanted values in 0..0", "got 0..1"]),
    ("lengths_low", {"visual_lengths": i(7, -1, 0)}, ValueError, ["visual_lengths: wanted values in 0..7", "-1..7"]),
    *(
        (f"offsets_{name}", {"x": z(15, 24), "cu_seqlens": offsets} | memory, ValueError, ["cu_seqlens: wanted offsets rising from 0 to N = 15", got])
        for name, offsets, memory, got in (
            ("end", i(0, 4, 9, 14), {}, "14"),
            ("start", i(1, 4, 9, 15), {}, "[1, 4, 9, 15]"),
            ("falling", i(0, 9, 4, 15), {}, "[0, 9, 4, 15]"),
            # Whatever the memory.
            ("of_one", i(0, 99), {"visual_key": z(1, 7, 24), "visual_value": z(1, 7, 24)}, "[0, 99]"),
            ("shared", i(0, 99), {"visual_key": z(7, 24), "visual_value": z(7, 24)}, "[0, 99]"),
            ("without_memory", i(0, 99), WITHOUT, "[0, 99]"),
            ("without_slots", i(0, 99), EMPTY | {"visual_key": z(1, 0, 24), "visual_value": z(1, 0, 24)}, "[0, 99]"),
        )
    ),
]  # fmt: skip


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


def test_nothing_ran_before_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(autograd, "choose", forbidden)
    monkeypatch.setattr(autograd, "normalize", forbidden)
    monkeypatch.setattr(autograd, "draw_seed", forbidden)
    for _, change, error, _ in CASES:
        for autocast in (False, True) if error is ValueError else (False,):  # it mends a dtype
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(error):
                fused_ffn(**({"dropout_p": 0.5} | good() | change))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_refused_call_leaves_the_generator_alone(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a = good() | {"dropout_p": 0.5}
    a["visual_value"] = a["visual_value"].clone().requires_grad_(grad)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="visual_index"):
        fused_ffn(**a, visual_index=i(0, 9, 1))
    monkeypatch.setattr("memvp_kernels.dispatch.missing", lambda name, device: None)
    monkeypatch.setattr(dispatch._module("decode"), "unsupported", lambda problem: "it has no dropout")
    with pytest.raises(
        RuntimeError,
        match=r"backend: wanted 'cuda', but (it has no dropout|the decode kernel has no backward).*; backend='auto'",
    ):
        fused_ffn(**a, backend="cuda")
    assert torch.equal(torch.get_rng_state(), before)


class OnGPU:
    """As much of a GPU tensor as the value checks look at; reading it is what they must not do unasked."""

    device = torch.device("cuda", 0)

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape, self.reads = values, values.shape, 0

    def dim(self) -> int:
        return self.values.dim()

    def numel(self) -> int:
        return self.values.numel()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args[0].reads += 1
        return function(args[0].values)

    def tolist(self) -> list[int]:
        self.reads += 1
        return self.values.tolist()


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("visual_index", i(0, 3, 1), "visual_index: wanted values in -1..2, got 0..3"),
        ("visual_lengths", i(7, 8, 0), "visual_lengths: wanted values in 0..7, got 0..8"),
        ("cu_seqlens", i(0, 9, 4, 3), "cu_seqlens: wanted offsets rising from 0 to N = 3, got [0, 9, 4, 3]"),
    ],
)
def test_on_a_gpu_values_are_read_only_when_asked(
    name: str, values: torch.Tensor, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = OnGPU(values)
    tensors = dict.fromkeys(("visual_index", "visual_lengths", "cu_seqlens")) | {
        "x": OnGPU(z(3, 5, 24)), "visual_key": OnGPU(z(3, 7, 24)), name: given
    }  # fmt: skip
    for unasked in (None, "0", ""):
        monkeypatch.delenv("MEMVP_CHECK", raising=False)
        if unasked is not None:
            monkeypatch.setenv("MEMVP_CHECK", unasked)
        value_checks.check_values(tensors)  # type: ignore[arg-type]
    assert given.reads == 0
    monkeypatch.setenv("MEMVP_CHECK", "1")
    with pytest.raises(ValueError, match=re.escape(said)):
        value_checks.check_values(tensors)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backends exist")
def test_backends_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"backend: wanted 'triton', but .*; backend='auto'"):
        fused_ffn(**good(), backend="triton")
    with pytest.raises(RuntimeError, match=r"backend: wanted 'cuda', but .*; backend='auto'"):
        fused_ffn(**good(), backend="cuda")


def test_triton_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("memvp_kernels.dispatch.missing", lambda name, device: None)
    a = cases.build("one_each-plain", torch.float64)
    with pytest.raises(
        RuntimeError,
        match=r"backend: wanted 'triton', but .*float32, float16 and bfloat16, not float64; backend='auto'",
    ):
        fused_ffn(**a, backend="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_dropped_nan_is_still_one(p: float, bad: float) -> None:
    """Dropout multiplies, in PyTorch: NaN · 0 is NaN, and so is ∞ · 0."""
    scores = torch.full((64,), bad)
    assert torch.nn.functional.dropout(scores, p).isfinite().sum() == 0
    a = cases.build("one_each-plain", F32) | {"activation": "relu", "dropout_p": p}
    a["visual_key"] = torch.full_like(a["visual_key"], bad)
    a["x"] = a["x"].abs() + 1
    assert fused_ffn(**a).isnan().all() or not math.isnan(bad)
    assert not fused_ffn(**a).isfinite().any()


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_a_slot_past_the_length_has_zero_gradient_beside_nan(form: str) -> None:
    a = cases.build(f"lengths-{form}", F32)  # 0, 7 and 4 of 7 slots
    a["x"][2, 1, 3] = float("nan")
    names = ["visual_key", "visual_value"]
    _, grads = tolerance.gradients(fused_ffn, a, names, torch.ones(()).expand(a["x"].shape))
    for g in grads.values():
        assert g[0].abs().sum() == 0
        assert g[2, 4:].abs().sum() == 0
        assert torch.isfinite(g[1]).all()
        assert g[2, :4].isnan().any()


@pytest.mark.parametrize("name", ["one_each-plain", "one_each-factored"])
@pytest.mark.parametrize("extra", [{}, {"visual_lengths": torch.zeros(0, dtype=torch.int32)}], ids=["", "lengths"])
def test_no_memory_rows_at_all(name: str, extra: dict[str, Any]) -> None:
    a = cases.build(name, F32) | extra
    a.update({n: a[n][:0] for n in ("visual_key", "visual_value")}, visual_index=i(-1, -1, -1))
    names, grad = tolerance.floating(a), torch.randn_like(a["x"])
    out, grads = tolerance.gradients(fused_ffn, a, names, grad)
    text = {n: a[n] for n in ("x", "key", "value", "gate")}
    expected, expected_grads = tolerance.gradients(fused_ffn, text, list(text), grad)
    assert torch.equal(out, expected)
    for n in names:
        assert grads[n].shape == a[n].shape
        assert torch.equal(grads[n], expected_grads.get(n, torch.zeros_like(a[n])))
