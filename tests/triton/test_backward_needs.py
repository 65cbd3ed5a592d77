"""What the backward computes, keeps and leaves alone: the matrix of needs, recomputation, the same bits, expanded gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memvp_kernels import reference
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton.gemm import IMPLEMENTATIONS, GemmSteps, override_implementation
from memvp_kernels.checks import TENSORS
from memvp_kernels.problem import Problem, Segments, normalize
from tests import cases, tolerance
from tests.cases import DEVICE

# The package gives the function of that name; this is the module around it.
passes = importlib.import_module("memvp_kernels.backends.triton.backward")
pytestmark = pytest.mark.device
MEMORY = ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
FFN = ("key", "gate", "value", "key_bias", "gate_bias", "value_bias")
FORMS = ("plain", "factored")


SCALARS = {"activation": "silu", "visual_activation": "gelu", "visual_scale": 0.3}


def arguments(form: str, dtype: torch.dtype, *, alone: bool = False) -> cases.Arguments:
    """Five sequences of nine tokens over three rows of memory, one of them without, one row unread."""
    a = cases.ffn(dtype, S=5, T=9, d=40, F=72, biased=not alone, alone=alone)
    a = cases.memory(a, R=3, M=17, r=24 if form == "factored" else None)
    a["visual_index"] = torch.tensor([2, -1, 0, 2, 2])
    return cases.moved(a)


def problem(
    form: str = "plain", *, alone: bool = False, dropout_p: float = 0.0, dtype: torch.dtype = torch.bfloat16
) -> Problem:
    return problem_of(arguments(form, dtype, alone=alone), dropout_p=dropout_p)


def problem_of(a: cases.Arguments, *, dropout_p: float = 0.0) -> Problem:
    seed = torch.tensor([77], device=DEVICE) if dropout_p else None
    return normalize({**{n: a.get(n) for n in TENSORS}, "seed": seed}, {**SCALARS, "dropout_p": dropout_p})


def judge(found: dict[str, Tensor], a: cases.Arguments, grad: Tensor) -> None:
    """Each gradient by the 2x rule, `a` being what the problem means."""
    names = list(found)
    a, grad = {**a, **SCALARS}, grad.reshape(a["x"].shape)
    exact = tolerance.gradients(lambda **b: reference.ffn(**b), a, names, grad)[1]
    orders = [tolerance.plain, *(tolerance.reordered(seed) for seed in (1, 2, 3))]
    theirs = [tolerance.gradients(order, a, names, grad)[1] for order in orders]
    for n, g in found.items():
        tolerance.assert_within_twice(g.reshape(a[n].shape), exact[n], [t[n] for t in theirs], f"gradient of {n}")


def trainable(p: Problem) -> frozenset[str]:
    return frozenset(n for n in ("x", *FFN, *MEMORY) if getattr(p, n) is not None)


def dy(p: Problem) -> Tensor:
    return torch.randn(p.x.shape, generator=torch.Generator().manual_seed(5)).to(p.x)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], names: Iterable[str]) -> None:
    assert found.keys() == set(names)
    for name in found:
        assert torch.equal(found[name], expected[name]), f"gradient of {name}"


@pytest.mark.parametrize("form", FORMS)
def test_each_gradient_alone_is_the_one_among_all(form: str) -> None:
    """Frozen and trainable in every single way, and in the usual ones together; nothing comes that was not asked for."""
    p = problem(form)
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    everything = backend.backward(p, dy(p), pre, scores, trainable(p))
    memory = trainable(p).intersection(MEMORY)
    usual: list[frozenset[str]] = [memory | {"x"}, memory, frozenset(("visual_value", "value_position"))]
    for needs in (*usual, *(frozenset((n,)) for n in sorted(trainable(p)))):
        assert_equal(backend.backward(p, dy(p), pre, scores, needs), everything, needs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("alone", "implementation"),
    [(False, "fused"), (False, "cublas"), (True, "fused")],
    ids=["with_ffn", "with_ffn_by_cublas", "alone"],
)
def test_saved_or_recomputed_the_same_bits_every_time(form: str, alone: bool, implementation: str) -> None:
    p = problem(form, alone=alone, dropout_p=0.3)
    needs = trainable(p)
    with override_implementation(implementation):
        y, pre, scores = backend.forward(p, save_hidden=not alone, save_scores=True)
        kept = [t.clone() for t in (pre, scores) if t is not None]
        first = backend.backward(p, dy(p), pre, scores, needs)
        assert all(torch.equal(t, k) for t, k in zip((t for t in (pre, scores) if t is not None), kept, strict=True))
        assert_equal(backend.backward(p, dy(p), pre, scores, needs), first, needs)
        assert_equal(backend.backward(p, dy(p), None, None, needs), first, needs)
        # Without the gradient of value, dpre overwrites the recomputed pre-activations.
        assert_equal(backend.backward(p, dy(p), None, None, needs - {"value"}), first, needs - {"value"})
        assert torch.equal(backend.forward(p, save_hidden=False, save_scores=False)[0], y)


@pytest.mark.parametrize("form", FORMS)
def test_an_expanded_gradient_and_nothing_written(form: str) -> None:
    """`out.sum().backward()` gives a gradient without strides; neither it nor what was kept is written."""
    p = problem(form)
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    assert pre is not None
    assert scores is not None
    kept = pre.clone(), scores.clone()
    expanded = torch.ones((), dtype=p.x.dtype, device=DEVICE).expand(p.x.shape)
    found = backend.backward(p, expanded, pre, scores, trainable(p))
    assert_equal(found, backend.backward(p, torch.ones_like(p.x), pre, scores, trainable(p)), trainable(p))
    transposed = dy(p).T.contiguous().T
    found = backend.backward(p, transposed, pre, scores, frozenset(("x",)))
    assert_equal(found, backend.backward(p, dy(p), pre, scores, frozenset(("x",))), ("x",))
    assert torch.equal(pre, kept[0])
    assert torch.equal(scores, kept[1])


#: needs -> the steps that must run for them with a plain memory; the others must not.
STEPS = {
    ("x",): {"dhidden", "dinput"},
    ("visual_value",): {"dhidden", "memory_gradients"},
    ("key_position",): {"dhidden", "dense_gradients"},
    ("value_bias",): set(),
    ("key",): {"dhidden"},
    ("value",): set(),
}


@pytest.mark.parametrize("needs", STEPS, ids="-".join)
def test_nothing_runs_that_nobody_needs(needs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()

    def recorded(name: str, known: Any) -> Any:
        @functools.wraps(known)
        def step(*arguments: Any, **options: Any) -> Any:
            ran.add(name)
            return known(*arguments, **options)

        return step

    p = problem()
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    steps = GemmSteps(*(recorded(name, step) for name, step in IMPLEMENTATIONS["fused"]._asdict().items()))
    for name in ("memory_gradients", "dense_gradients"):
        monkeypatch.setattr(passes, name, recorded(name, getattr(passes, name)))
    backend.backward(p, dy(p), pre, scores, frozenset(needs), steps=steps)
    assert ran == STEPS[needs]


def test_memory_trained_under_a_frozen_ffn_reads_no_weight() -> None:
    """With x frozen too, as in the first layer, neither the pre-activations nor a weight is touched."""
    p = problem()
    _, _, scores = backend.forward(p, save_hidden=False, save_scores=True)
    poisoned = Problem(**{**vars(p), **{n: torch.full_like(getattr(p, n), float("nan")) for n in FFN}})
    found = backend.backward(poisoned, dy(p), None, scores, frozenset(MEMORY[:2]))
    assert all(g.isfinite().all() for g in found.values())


class _NewMatrices(TorchDispatchMode):
    """The operations that make a new matrix of x's shape, except allocations for a kernel's result."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.names = shape, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = (
            isinstance(out, Tensor) and out.shape == self.shape and not func.is_view and all(out is not t for t in args)
        )
        if new and not func.name().startswith(("aten::empty", "aten::new_empty")):
            self.names.add(func.name())
        return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True], ids=["uniform", "packed"])
def test_rows_without_memory_are_walked_past_and_not_copied_away(form: str, packed: bool) -> None:
    """x and dy (N, d) are read where they lie, whoever has no image."""
    p = problem(form)
    if packed:
        cu = torch.tensor([2, 9, 20, 20, 31, 40], dtype=torch.int32, device=DEVICE)
        p = Problem(**{**vars(p), "segments": Segments(45, 5, None, cu_seqlens=cu, index=p.segments.index)})
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    grad = dy(p)
    with _NewMatrices(p.x.shape) as found:
        backend.backward(p, grad, pre, scores, trainable(p).intersection(("x", *MEMORY)))
    assert not found.names
    with _NewMatrices(p.x.shape) as found:
        backend.backward(p, grad.T.contiguous().T, pre, scores, trainable(p).intersection(MEMORY))
    assert found.names == {"aten::clone"}, "a copy was meant to be seen"


@pytest.mark.parametrize("form", FORMS)
def test_rows_outside_every_sequence(form: str) -> None:
    """Packed rows before the first and after the last offset: the FFN's gradient and none of the memory's."""
    a = arguments(form, torch.float32)
    p = problem_of(a)
    cu = torch.tensor([4, 20, 20, 38], dtype=torch.int32, device=DEVICE)
    p = Problem(**{**vars(p), "segments": Segments(rows=45, sequences=3, length=None, cu_seqlens=cu)})
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    found = backend.backward(p, dy(p), pre, scores, trainable(p))
    # What it means: a first sequence without a memory, and rows after the last that belong to none.
    offsets, index = torch.tensor([0, 4, 20, 20, 38], device=DEVICE), torch.tensor([-1, 0, 1, 2], device=DEVICE)
    judge(found, {**a, "x": p.x, "cu_seqlens": offsets, "visual_index": index}, dy(p))
    text = Problem(**{**vars(p), **dict.fromkeys(MEMORY), "segments": Segments(45, 1, 45, shared=True)})
    dx = backend.backward(text, dy(p), pre, None, frozenset(("x",)))["x"]
    outside = [*range(4), *range(38, 45)]
    assert torch.equal(found["x"][outside], dx[outside])
    assert not found["visual_key"][1].any()


@pytest.mark.parametrize("empty", ["slots", "rank", "rows", "pairs", "memories"])
def test_empty_sizes(empty: str) -> None:
    a = arguments("factored", torch.float32)
    T, F, R, M, r = 9, 72, 3, 17, 24
    T, F = 0 if empty == "rows" else T, 0 if empty == "pairs" else F
    R, M, r = 0 if empty == "memories" else R, 0 if empty == "slots" else M, 0 if empty == "rank" else r
    a |= {
        "x": a["x"][:, :T], "key": a["key"][:F], "gate": a["gate"][:F], "value": a["value"][:F], "key_bias": a["key_bias"][:F],
        "gate_bias": a["gate_bias"][:F], "visual_key": a["visual_key"][:R, :M, :r], "visual_value": a["visual_value"][:R, :M, :r],
        "visual_basis": a["visual_basis"][:r], "key_position": a["key_position"][:M], "value_position": a["value_position"][:M],
        "visual_index": a["visual_index"] if R else torch.full_like(a["visual_index"], -1),
    }  # fmt: skip
    # Past `normalize`, which would drop a memory without slots before the backend sees it.
    full = problem_of({n: t for n, t in a.items() if n not in MEMORY and n != "visual_index"})
    index = a["visual_index"].to(torch.int32)
    p = Problem(**{**vars(full), **{n: a[n] for n in MEMORY}, "segments": Segments(5 * T, 5, T, index=index)})
    _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    found = backend.backward(p, dy(p), pre, scores, trainable(p))
    assert found.keys() == trainable(p)
    judge(found, a, dy(p))
