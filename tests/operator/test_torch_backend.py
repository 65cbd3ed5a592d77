"""The torch backend, through the public function, against the float64 definition: output and every gradient."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import fused_ffn
from tests import cases, tolerance
from tests.cases import DEVICE

# On a GPU "auto" would take another backend for some of these.
run = functools.partial(fused_ffn, backend="torch")
pytestmark = pytest.mark.device
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.usefixtures("two_threads")
def test_case_on_two_threads(name: str) -> None:
    tolerance.check(run, cases.build(name, torch.float32, DEVICE))


@pytest.mark.parametrize("name", cases.names())
def test_case_in_float64(name: str) -> None:
    tolerance.check(run, cases.build(name, torch.float64, DEVICE))


@pytest.mark.parametrize("name", ["index-plain", "index-factored", "packed_index_lengths-factored", "text_only_biased"])
def test_recompute_gives_the_same_bits(name: str) -> None:
    a = cases.build(name, torch.bfloat16, DEVICE)
    floating = [n for n in tolerance.FLOATING if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    kept, kept_grads = tolerance.gradients(run, a, floating, grad)
    again, again_grads = tolerance.gradients(functools.partial(run, recompute=True), a, floating, grad)
    assert torch.equal(kept, again)
    assert all(torch.equal(kept_grads[n], again_grads[n]) for n in floating)


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_layouts(form: str) -> None:
    a = cases.build(f"one_each-{form}", torch.float32, DEVICE)
    expected = run(**a)
    for what, other in cases.strided(a):
        torch.testing.assert_close(run(**other), expected, msg=lambda m, what=what: f"{what}: {m}")
        assert run(**other).is_contiguous()


def test_layouts_reach_the_gradients() -> None:
    a = cases.build("one_each-plain", torch.float32, DEVICE)
    for _, other in cases.strided(a):
        tolerance.check(run, other)


def test_expanded_gradient() -> None:
    """out.sum().backward() sends a gradient with stride 0."""
    a = cases.build("index-factored", torch.float32, DEVICE)
    tolerance.check(run, a, grad=torch.ones((), device=DEVICE).expand(a["x"].shape))


def test_it_is_the_concatenated_form() -> None:
    """For a plain FFN with one activation and scale 1: exactly act(x·[K;Kv]ᵀ)·[V;Vv], what the paper writes."""
    a = cases.build("shared_by_all-plain", torch.float64, DEVICE)
    a.pop("gate")
    kv, vv = a["visual_key"] + a["key_position"], a["visual_value"] + a["value_position"]
    z = a["x"] @ torch.cat([a["key"], kv]).T
    torch.testing.assert_close(run(**a), torch.nn.functional.silu(z) @ torch.cat([a["value"], vv]))


def test_factored_is_the_multiplied_out_memory() -> None:
    a = cases.build("index-factored", torch.float64, DEVICE)
    whole = {n: a[n] @ a["visual_basis"] for n in ("visual_key", "visual_value")}
    expected = run(**{**a, **whole, "visual_basis": None})
    torch.testing.assert_close(run(**a), expected)
