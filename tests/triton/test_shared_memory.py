"""The kernels on a memory that many calls read: operands joined by the caller, gradients whole and added in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import reference
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.problem import SHARED, Problem, Segments
from tests import cases, stack, tolerance
from tests.triton.test_backward import small_tiles
from tests.triton.test_backward_needs import SCALARS, assert_equal, dy, problem

__all__ = ["small_tiles"]  # a fixture for every test here

DEVICE = cases.DEVICE


def _shared(dtype: torch.dtype = torch.float32, **changes: Any) -> Problem:
    """A problem with the operands that :mod:`memvp_kernels.shared_memory` would form."""
    p = problem("factored", alone=True, dtype=dtype)
    assert p.visual_basis is not None and p.key_position is not None and p.value_position is not None
    joined = [torch.cat([p.visual_basis, position]) for position in (p.key_position, p.value_position)]
    return Problem(
        **{**vars(p), "visual_value": p.visual_key, "key_operand": joined[0], "value_operand": joined[1], **changes}
    )


def _means(ffn: Callable[..., Tensor], core: Tensor, key_operand: Tensor, value_operand: Tensor, **a: Any) -> Tensor:
    """`ffn` on the operator's own arguments; of the two bases each core sees its own, so that each has its own gradient."""
    rank, none = core.shape[-1], torch.zeros_like(core)
    return ffn(
        key=None, value=None, visual_key=torch.cat([core, none], -1), visual_value=torch.cat([none, core], -1),
        visual_basis=torch.cat([key_operand[:rank], value_operand[:rank]]), key_position=key_operand[rank:],
        value_position=value_operand[rank:], **SCALARS, **a,
    )  # fmt: skip


def _judge(found: dict[str, Tensor], p: Problem, before: dict[str, Tensor] | None = None) -> None:
    """The gradients of `SHARED` by the 2x rule, alone or added to what was there."""
    index = torch.zeros(5, dtype=torch.int32, device=DEVICE) if p.segments.index is None else p.segments.index
    a = {"x": p.x.reshape(5, 9, -1), "visual_index": index, **{name: getattr(p, name) for name in SHARED}}
    orders = (reference.ffn, tolerance.plain, *(tolerance.reordered(seed) for seed in (1, 2, 3)))
    exact, *theirs = (
        tolerance.gradients(lambda f=f, **b: _means(f, **b), a, list(SHARED), dy(p).reshape(a["x"].shape))[1]
        for f in orders
    )
    for name in SHARED:
        start = torch.zeros_like(found[name]) if before is None else before[name]
        tolerance.assert_within_twice(
            found[name], start.double() + exact[name].double(), [start + t[name] for t in theirs], name
        )


def _sums(p: Problem) -> dict[str, Tensor]:
    return {name: torch.randn(getattr(p, name).shape).to(DEVICE) for name in SHARED}


@pytest.mark.parametrize(
    ("dtype", "index", "splits"),
    [(torch.float32, False, 1), (torch.float32, True, 3), (torch.bfloat16, False, 3), (torch.bfloat16, True, 1)],
)
def test_within_twice_pytorchs_own_error(
    dtype: torch.dtype, index: bool, splits: int, operands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward_tiles, "row_splits", lambda *_: splits)
    stack.check(cases.moved(stack.arguments(dtype, index=index)), backend="triton")


@pytest.mark.parametrize("readers", ["index", "one_row_for_all", "nobody"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_gradient_is_added_to_its_sum(readers: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_tiles, "row_splits", lambda *_: splits)
    p = _shared()
    assert p.visual_key is not None
    if readers == "one_row_for_all":
        core = p.visual_key[:1].contiguous()
        p = Problem(
            **{**vars(p), "visual_key": core, "visual_value": core, "segments": Segments(45, 1, 45, shared=True)}
        )
    elif readers == "nobody":
        none = torch.full((5,), -1, dtype=torch.int32, device=DEVICE)
        p = Problem(**{**vars(p), "segments": Segments(45, 5, 9, index=none)})
    _, _, scores = backend.forward(p, save_hidden=False, save_scores=True)
    needs = frozenset(("x", *SHARED))
    fresh = backend.backward(p, dy(p), None, scores, needs)
    _judge(fresh, p)
    before = _sums(p)
    sums = {n: t.clone() for n, t in before.items()}
    found = backend.backward(p, dy(p), None, scores, needs, sums)
    for name in SHARED:
        assert found[name].data_ptr() == sums[name].data_ptr(), f"{name}: not in place"
        torch.testing.assert_close(found[name], before[name] + fresh[name])
    assert torch.equal(found["x"], fresh["x"])


@pytest.mark.parametrize(
    "needs", [*((n,) for n in SHARED), ("key_operand", "value_operand"), ("x", "core")], ids="-".join
)
def test_each_gradient_alone_is_the_one_among_all(needs: tuple[str, ...]) -> None:
    p = _shared(torch.bfloat16)
    _, _, scores = backend.forward(p, save_hidden=False, save_scores=True)
    everything = backend.backward(p, dy(p), None, scores, frozenset(("x", *SHARED)))
    found = backend.backward(p, dy(p), None, scores, frozenset(needs))
    assert_equal(found, everything, needs)
    assert all(found[n].dtype == torch.float32 for n in SHARED if n in needs)


def test_one_sum_given_and_the_other_not() -> None:
    p = _shared()
    _, _, scores = backend.forward(p, save_hidden=False, save_scores=True)
    needs = frozenset(SHARED)
    fresh = backend.backward(p, dy(p), None, scores, needs)
    found = backend.backward(p, dy(p), None, scores, needs, {"value_operand": torch.ones_like(fresh["value_operand"])})
    torch.testing.assert_close(found["value_operand"], 1 + fresh["value_operand"])
    assert_equal({"key_operand": found["key_operand"]}, fresh, ("key_operand",))


@pytest.mark.parametrize("empty", ["slots", "rank", "memories"])
def test_empty_sizes(empty: str) -> None:
    """The sums come back as they were."""
    p = _shared()
    assert p.visual_key is not None and p.key_operand is not None and p.value_operand is not None
    R, M, r = (0 if empty == what else size for what, size in (("memories", 3), ("slots", 17), ("rank", 24)))
    core = p.visual_key[:R, :M, :r].contiguous()
    joined = [t[24 - r : 24 + M].contiguous() for t in (p.key_operand, p.value_operand)]
    index = p.segments.index if R else torch.full((5,), -1, dtype=torch.int32, device=DEVICE)
    p = Problem(
        **{
            **vars(p), "visual_key": core, "visual_value": core, "key_operand": joined[0], "value_operand": joined[1],
            "visual_basis": joined[0][:r], "key_position": joined[0][r:], "value_position": joined[1][r:],
            "segments": Segments(45, 5, 9, index=index),
        }
    )  # fmt: skip
    _, _, scores = backend.forward(p, save_hidden=False, save_scores=True)
    before = _sums(p)
    needs = frozenset(SHARED)
    found = backend.backward(p, dy(p), None, scores, needs, {n: t.clone() for n, t in before.items()})
    _judge(found, p, before)
    if empty != "rank":
        assert torch.equal(found["core"], before["core"])
