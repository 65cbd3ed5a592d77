"""The cost model: it counts the launches that happen, prices cuBLAS as measured, and never chooses the dearer implementation."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import gemm
from memvp_kernels.backends.triton.heuristics import cost_model
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.hardware import chip_of
from memvp_kernels.problem import Problem
from tests.triton.conftest import INTERPRETED
from tests.triton.test_backward_needs import dy, problem

HOPPER = chip_of(90)


def shape(rows: int, *, dense: bool = True, **changes: Any) -> Shape:
    """LLaMA-7B's FFN with its memory, sequences of 512."""
    sequences = 1 if dense else max(rows // 512, 1)
    given = {
        "dtype": torch.bfloat16, "precision": "ieee", "rows": rows, "width": 4096, "pairs": 11008, "slots": 456 if dense else 320,
        "sequences": sequences, "length": rows // sequences, "gated": True, "dense": dense, "descriptors": True,
    }  # fmt: skip
    return Shape(**{**given, **changes})  # type: ignore[arg-type]


def test_cublas_runs_at_the_measured_rate() -> None:
    cycles = cost_model.product_cycles(HOPPER, torch.bfloat16, "ieee", 8192, 8192, 8192)
    assert 2 * 8192**3 / (cycles / HOPPER.clock / 1e9) == pytest.approx(790e12, rel=0.01)


def by_cublas(of: Shape) -> set[str]:
    """The steps that are left to cuBLAS."""
    chosen = zip(cost_model.STEPS, cost_model.choice(HOPPER, of), strict=True)
    return {step for step, name in chosen if name == "cublas"}


def test_what_decides() -> None:
    """Few rows: launches and passes. Many: a slower loop against a pass, five N·F numbers for dHidden and none for the output."""
    assert "hidden" not in by_cublas(shape(64))
    chosen = by_cublas(shape(8192))
    assert "output" in chosen
    assert "dhidden" not in chosen
    assert not by_cublas(shape(45, width=40, pairs=72, slots=17))


def test_ieee_float32_is_left_to_cublas() -> None:
    for rows in (512, 4096):
        assert by_cublas(shape(rows, dtype=torch.float32)) == set(cost_model.STEPS)


class _Products(TorchDispatchMode):
    """Counts the matrix products that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0].rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.found["launches"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["plain", "factored"])
@pytest.mark.parametrize("implementation", cost_model.NAMES)
def test_launches_are_counted_right(form: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's launches of the four steps are those of a forward and a backward with a frozen FFN."""
    p = Problem(**{**vars(problem(form)), "key_position": None, "value_position": None})
    launched: list[str] = []
    known = triton.runtime.interpreter.GridExecutor if INTERPRETED else triton.runtime.jit.JITFunction
    method = "__call__" if INTERPRETED else "run"
    run = getattr(known, method)

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(known, method, counted)

    def of_steps(*names: str) -> int:
        return sum(sum(cost_model.launches(gemm.shape_of(p), name, implementation)) for name in names)

    def kernels() -> int:
        large = ("hidden", "output", "dinput", "activation")  # dhidden among them
        return sum(any(word in name for word in large) for name in launched)

    with gemm.override_implementation(implementation):
        with _Products() as products:
            _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
        assert kernels() + products.found["launches"] == of_steps("hidden", "output")
        launched.clear()
        with _Products() as products:
            backend.backward(p, dy(p), pre, scores, frozenset(("x",)))
        assert kernels() + products.found["launches"] == of_steps("dhidden", "dinput")
