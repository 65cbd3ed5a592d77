"""What the forward kernels keep, and operands wherever they lie; that they are right, test_backward.py checks with every gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn, reference
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton.device.operands import TMA, TMA_PAIR
from memvp_kernels.backends.triton.kernels import hidden
from memvp_kernels.backends.triton.runtime import tma
from memvp_kernels.problem import Problem, Segments
from tests import tolerance
from tests.cases import DEVICE
from tests.triton.test_backward import example, integers, small_tiles
from tests.triton.test_backward_needs import problem_of

__all__ = ["small_tiles"]  # a fixture for every test here

run = functools.partial(fused_ffn, backend="triton")
pytestmark = pytest.mark.device


def check(a: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = run(**a)
        tolerance.assert_within_twice(out, reference.ffn(**a), tolerance.plain(**a))
    return out


@pytest.mark.parametrize("layout", ["gate_first", "key_first", "one_tensor", "transposed", "key_transposed"])
def test_gate_and_key_wherever_they_lie(layout: str) -> None:
    """Separate weights share one descriptor by their distance; where they can't, they are two operands."""
    a = example(torch.bfloat16, lengths=[35, 35], M=8, form="plain")
    both = torch.stack([a["gate"], a["key"]])
    if layout == "gate_first":
        a["gate"], a["key"] = both
    elif layout == "key_first":
        a["key"], a["gate"] = both
    elif layout == "one_tensor":
        a["gate"] = a["key"]
    elif layout == "transposed":
        a["key"], a["gate"] = (a[n].T.contiguous().T for n in ("key", "gate"))
    else:
        a["key"] = a["key"].T.contiguous().T
    paired = layout in ("gate_first", "key_first")
    assert tma.can_pair(a["gate"], a["key"]) == paired
    check(a)


def test_a_pair_that_the_driver_refuses_becomes_two_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """One descriptor over two allocations may fail to encode; it is tried once in a process."""
    a = example(torch.bfloat16, lengths=[35, 35], M=8, form="plain")
    a["gate"], a["key"] = torch.stack([a["gate"], a["key"]])
    tried: list[int] = []
    known = hidden.hidden_fwd_kernel

    class Refusing:
        def __getitem__(self, grid: Any) -> Any:
            def launched(*arguments: Any, **constants: Any) -> Any:
                tried.append(constants["LOAD_KEY"])
                if constants["LOAD_KEY"] == TMA_PAIR.value:
                    raise RuntimeError("Triton Error [CUDA]: invalid argument")
                return known[grid](*arguments, **constants)

            return launched

    monkeypatch.setattr(hidden, "hidden_fwd_kernel", Refusing())
    monkeypatch.setattr(tma, "_pairs_refused", False)
    for _ in range(2):
        check(a)
    assert tried == [TMA_PAIR.value, TMA.value, TMA.value]


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_what_is_kept_for_the_backward(form: str) -> None:
    """Pre-activations with their biases, and scores that are zero wherever there is no memory."""
    a = example(torch.float32, lengths=[11] * 4, M=17, form=form)
    a["key_bias"], a["gate_bias"] = torch.randn(72, device=DEVICE), torch.randn(72, device=DEVICE)
    index, lengths = [2, -1, 2, 0], [17, 5, 4, 0]
    given = {"visual_index": integers(*index), "visual_lengths": integers(*lengths)}
    problem = problem_of(a | given)
    y, pre, scores = backend.forward(problem, save_hidden=True, save_scores=True)
    assert pre is not None
    assert scores is not None
    orders = [torch.arange(40), *(torch.randperm(40) for _ in range(3))]

    def products(left: Tensor, right: Tensor) -> list[Tensor]:
        """left rightᵀ in PyTorch's float32, summed in a few orders."""
        return [left[:, o] @ right[:, o].T for o in orders]

    x = problem.x
    for kept, weight, bias in zip(pre, ("gate", "key"), ("gate_bias", "key_bias"), strict=True):
        exact = x.double() @ a[weight].double().T + a[bias].double()
        tolerance.assert_within_twice(kept, exact, [p + a[bias] for p in products(x, a[weight])], weight)
    expected = torch.zeros(44, 17, dtype=torch.float64, device=DEVICE)
    theirs = [expected.float() for _ in orders]
    for s, row in enumerate(index):
        if row < 0:
            continue
        rows, core, position = slice(11 * s, 11 * (s + 1)), a["visual_key"][row], a["key_position"]
        key = core.double() if form == "plain" else core.double() @ a["visual_basis"].double()
        expected[rows] = x[rows].double() @ (key + position.double()).T
        if form == "plain":
            own = products(x[rows], core + position)
        else:
            through = products(x[rows], a["visual_basis"])
            own = [t @ core.T + p for t, p in zip(through, products(x[rows], position), strict=True)]
        for t, product in zip((expected, *theirs), (expected[rows], *own), strict=True):
            t[rows] = product
            t[rows, lengths[row] :] = 0
    tolerance.assert_within_twice(scores, expected, theirs, "scores")
    assert (scores[expected == 0] == 0).all()

    bare, nothing, none = backend.forward(problem, save_hidden=False, save_scores=False)
    assert nothing is None
    assert none is None
    assert torch.equal(bare, y)


def test_rows_outside_every_sequence_have_no_memory() -> None:
    a = example(torch.float32, lengths=[20, 13], M=17, form="plain", packed=True)
    cu = torch.tensor([4, 20, 30], dtype=torch.int32, device=DEVICE)
    segments = Segments(rows=33, sequences=2, length=None, cu_seqlens=cu)
    for form in ("plain", "factored"):
        b = a if form == "plain" else example(torch.float32, lengths=[20, 13], M=17, form=form, packed=True)
        one = problem_of(dict(b, x=b["x"][None], cu_seqlens=None, visual_index=integers(0)))
        problem = Problem(**{**vars(one), "segments": segments})
        y, _, scores = backend.forward(problem, save_hidden=False, save_scores=True)
        assert scores is not None
        text = run(b["x"], b["key"], b["value"], gate=b["gate"])
        outside = [*range(4), *range(30, 33)]
        assert torch.equal(y[outside], text[outside])
        assert (scores[outside] == 0).all()
        assert not torch.equal(y[4:30], text[4:30])


@pytest.mark.slow  # the interpreter copies each argument's storage back, and this one has 4 GB
def test_offsets_pass_two_to_the_31() -> None:
    """Rows 2³¹ elements apart, in memory that is reserved and never touched between them."""
    a = example(torch.float16, lengths=[3], M=4, form="plain")
    reserved = torch.zeros(2**31 + 80, dtype=torch.float16, device=DEVICE)
    far = reserved.as_strided((3, 40), (2**30, 1)).copy_(a["x"][0])
    assert torch.equal(run(**dict(a, x=far[None])), run(**a))
