"""The torch backend, through the public function, against the float64 definition: output and every gradient."""

from __future__ import annotations

import functools

import pytest
import torch

from memvp_kernels import autograd, fused_ffn
from memvp_kernels.backends.torch import memory_rows
from memvp_kernels.backends.torch.memory_rows import Blocked
from tests import cases, relatives, tolerance
from tests.cases import DEVICE
from tests.operator import test_inputs

# On a GPU "auto" would take another backend for some of these.
run = functools.partial(fused_ffn, backend="torch")
pytestmark = pytest.mark.device
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.parametrize("name", cases.names())
@pytest.mark.usefixtures("exchanged")
def test_case_on_two_threads(name: str) -> None:
    tolerance.check(run, cases.build(name, torch.float32, DEVICE))


@pytest.mark.parametrize("name", cases.names())
def test_case_in_float64(name: str) -> None:
    tolerance.check(run, cases.build(name, torch.float64, DEVICE))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "memvp") for name in ("index-factored", "packed_index_lengths-plain", "text_only_biased")),
        *((name, "adem") for name in ("index-plain", "packed_index_lengths-factored", "same_tensor-factored")),
    ],
)
def test_recompute_gives_the_same_bits(name: str, method: str) -> None:
    a = cases.build(name, torch.bfloat16, DEVICE) | relatives.METHODS[method]  # near ties included
    kept, again = (tolerance.results(functools.partial(run, recompute=r), a) for r in (False, True))
    tolerance.assert_same(again, kept)


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


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no index is read: rows go by blocks."""
    monkeypatch.setattr(memory_rows, "Grouped", lambda segments, memories: Blocked(segments, memories, DEVICE))


_BY_INDEX = [name for name in cases.names() if name.startswith(("index", "packed"))] + ["nobody_has_memory"]


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _BY_INDEX)
def test_case_in_blocks(name: str, dtype: torch.dtype) -> None:
    tolerance.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("spoiled", ["key_position", "visual_key", "visual_value"])
@pytest.mark.parametrize("name", ["index-plain", "packed_index_lengths-factored"])
def test_nan_in_blocks(name: str, spoiled: str) -> None:
    test_inputs.test_nan_reaches_only_the_rows_that_read_it("torch", name, spoiled)
    relatives.check_unread_nan(run, name.rsplit("-")[1], "memvp")
    if name in cases.IDLE:
        test_inputs.test_a_row_without_memory_gives_what_is_shared_no_gradient("torch", name, frozen_memory=False)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_out_of_range_in_blocks_is_no_memory(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody looks at the values before."""
    monkeypatch.setattr(autograd, "check_values", lambda tensors: None)
    a = cases.build(f"index-{form}", torch.float32, DEVICE)
    wild, meant = (torch.tensor(index, device=DEVICE) for index in ([2, 3, -7, 2**31 - 1], [2, -1, -1, -1]))
    found, wanted = (tolerance.results(run, dict(a, visual_index=index)) for index in (wild, meant))
    tolerance.assert_same(found, wanted)
