"""The cost of the roads: launches as many as really happen, the library's rate as measured, the choice never the dearer one."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import gemm as steps
from memvp_kernels.backends.triton.heuristics import cost_model as roads
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.rates import RATES
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.problem import Problem
from tests.triton.conftest import INTERPRETED
from tests.triton.test_backward_needs import dy, problem

HOPPER = tiles.chip_of(90)


def shape(rows: int, *, dense: bool = True, **changes: Any) -> Shape:
    """LLaMA-7B's FFN with its memory, sequences of 512."""
    sequences = 1 if dense else max(rows // 512, 1)
    given = {
        "dtype": torch.bfloat16, "precision": "ieee", "rows": rows, "width": 4096, "pairs": 11008, "slots": 456 if dense else 320,
        "sequences": sequences, "length": rows // sequences, "gated": True, "dense": dense, "descriptors": True,
    }  # fmt: skip
    return Shape(**{**given, **changes})  # type: ignore[arg-type]


def cost(of: Shape, step: str, road: str) -> float:
    return roads.step_cycles(HOPPER, of, step, road)


def test_the_librarys_rate_is_the_measured_one() -> None:
    cycles = roads.product_cycles(HOPPER, torch.bfloat16, "ieee", 8192, 8192, 8192)
    assert 2 * 8192**3 / (cycles / HOPPER.clock / 1e9) == pytest.approx(790e12, rel=0.01)


def test_no_product_is_faster_than_its_arithmetic_and_its_bytes() -> None:
    for rows, columns, depth in itertools.product((16, 512, 8192), (456, 4096, 11008), (320, 4096, 11008)):
        cycles = roads.product_cycles(HOPPER, torch.bfloat16, "ieee", rows, columns, depth)
        flops = 2 * rows * columns * depth
        assert cycles >= flops / (HOPPER.tensor * HOPPER.multiprocessors * RATES.library)
        assert cycles >= 2 * (rows * depth + depth * columns + rows * columns) / HOPPER.memory


@pytest.mark.parametrize("dense", [True, False])
def test_each_step_takes_the_cheaper_road(dense: bool) -> None:
    for rows in (16, 64, 512, 1024, 4096, 8192):
        of = shape(rows, dense=dense)
        for among in (roads.CHOSEN_FROM, roads.ROADS):
            for step, road in zip(roads.STEPS, roads.choice(HOPPER, of, among), strict=True):
                assert cost(of, step, road) == min(cost(of, step, other) for other in among)


def by_library(of: Shape) -> set[str]:
    """The steps that the library takes of those that it and the fused kernels share."""
    return {step for step, road in zip(roads.STEPS, roads.choice(HOPPER, of), strict=True) if road == "library"}


def test_what_decides() -> None:
    """Few rows: launches and passes. Many: a slower loop against a pass, five N·F numbers for dHidden and none for the output."""
    assert "hidden" not in by_library(shape(64))
    chosen = by_library(shape(8192))
    assert "output" in chosen
    assert "dhidden" not in chosen
    assert not by_library(shape(45, width=40, pairs=72, slots=17))


def test_ieee_float32_goes_by_the_library() -> None:
    for rows in (512, 4096):
        assert by_library(shape(rows, dtype=torch.float32)) == set(roads.STEPS)


def test_hopper_without_descriptors_has_more_reason_for_the_library() -> None:
    for step in roads.STEPS:
        assert cost(shape(8192, descriptors=False), step, "fused") > cost(shape(8192), step, "fused")
    assert by_library(shape(8192, descriptors=False)) == set(roads.STEPS)


def test_more_rows_never_cost_less() -> None:
    for step, road, dense in itertools.product(roads.STEPS, roads.ROADS, (True, False)):
        times = [cost(shape(rows, dense=dense), step, road) for rows in (16, 64, 512, 1024, 4096, 8192)]
        assert times == sorted(times), (step, road)


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
@pytest.mark.parametrize("road", roads.CHOSEN_FROM)
def test_launches_are_counted_right(form: str, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        return sum(sum(roads.launches(steps.shape_of(p), name, road)) for name in names)

    def kernels() -> int:
        large = ("hidden", "output", "dinput")  # form_hidden and dhidden among them
        return sum(any(word in name for word in large) or name == "form_dpre_kernel" for name in launched)

    with steps.forced(road):
        with _Products() as products:
            _, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
        assert kernels() + products.found["launches"] == of_steps("hidden", "output")
        launched.clear()
        with _Products() as products:
            backend.backward(p, dy(p), pre, scores, frozenset(("x",)))
        assert kernels() + products.found["launches"] == of_steps("dhidden", "dinput")
