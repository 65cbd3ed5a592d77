"""The check before the time: right variants pass, and every way of being wrong is noticed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from harness import measure as measuring
from harness.correctness import allowed_error, judge, relative_error
from harness.ffn_case import exact_ffn
from harness.graphs import DeviceLostError, WrongReplayError
from harness.inputs import hidden_states
from harness.measure import BrokenDeviceError, Candidate, Truth, held_bytes, measure
from harness.operands import Adapter, Parts, Weights
from harness.presets import PRESETS
from harness.results import Row
from harness.rooflines import Count, Roofs
from harness.timer import Run, Timer
from harness.variants import Variant, variants, yardstick

CPU = torch.device("cpu")
PRESET = PRESETS["smallest"]
ALL = variants(CPU, compiled=False)
MEMORY = [name for name, variant in ALL.items() if variant.has_memory and variant.missing(CPU) is None]


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, Weights, Parts]:
    adapter = Adapter(PRESET, slots=PRESET.slots, device=CPU)
    parts = adapter.parts(adapter.batch(3, 17), dtype=dtype).map(torch.Tensor.detach)
    weights = Weights.random(PRESET, device=CPU, dtype=dtype, seed=1)
    return hidden_states(3, 11, PRESET.width, device=CPU, dtype=dtype), weights, parts


def compute(variant: Variant, x: torch.Tensor, weights: Weights, parts: Parts) -> torch.Tensor:
    bound = variant.bind(weights, variant.share(parts)) if variant.has_memory else None
    return variant.step(x, weights, bound, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEMORY)
def test_every_variant_computes_the_same_function(name: str, dtype: torch.dtype) -> None:
    x, weights, parts = problem(dtype)
    plain = compute(ALL[yardstick(ALL[name].form)], x, weights, parts)
    error, allowed = judge(
        {"y": compute(ALL[name], x, weights, parts)}, {"y": plain}, {"y": exact_ffn(x, weights, parts)}
    )
    assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_memories_do_not_pass(dtype: torch.dtype) -> None:
    """None at all, another image's, one slot short, no positions on the value: each is far outside what is allowed."""
    x, weights, parts = problem(dtype)
    exact = exact_ffn(x, weights, parts)
    plain = compute(ALL["factored-eager"], x, weights, parts)
    short = Parts(parts.core, parts.basis, parts.key_position, parts.value_position.clone(), parts.scale)
    short.value_position[-1] = 0
    wrong = {
        "none": compute(ALL["text"], x, weights, parts),
        "another image": compute(
            ALL["factored-eager"], x, weights,
            Parts(parts.core.roll(1, 0), parts.basis, parts.key_position, parts.value_position, parts.scale),
        ),
        "one slot short": compute(ALL["factored-eager"], x, weights, short),
    }  # fmt: skip
    for what, y in wrong.items():
        error, allowed = judge({"y": y}, {"y": plain}, {"y": exact})
        assert error > 2 * allowed, what


def test_errors_are_relative_and_never_hide_a_nan() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.nan]), exact) == math.inf
    assert relative_error(torch.tensor([3.0]), exact) == math.inf
    assert allowed_error(exact.float(), exact) == torch.finfo(torch.float32).eps / 2


def test_one_wrong_output_of_several_is_enough() -> None:
    exact = {"y": torch.ones(4).double(), "dx": torch.ones(4).double()}
    plain = {name: t.float() * (1 + 1e-6) for name, t in exact.items()}
    found = judge({"y": plain["y"], "dx": plain["dx"] * 1.5}, plain, exact)
    assert found[0] == pytest.approx(0.5 / 2**0.5, rel=1e-3)
    assert found[1] == pytest.approx(2e-6, rel=0.1)
    lucky = {"y": plain["y"], "dx": exact["dx"].float()}  # PyTorch hit one of the two exactly
    assert judge(plain, lucky, exact)[0] <= judge(plain, lucky, exact)[1]
    with pytest.raises(KeyError):
        judge({"y": plain["y"]}, plain, exact)


def candidate(name: str, factor: float, log: list[str], **more: object) -> Candidate:
    exact = torch.arange(1.0, 9.0, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-6)

    def build() -> tuple[dict[str, torch.Tensor], Run, int]:
        if factor < 0:
            raise RuntimeError("out of something\nsecond line")
        return {"y": plain * factor}, Run([lambda: log.append(name)]), 40

    return Candidate(name, build, lambda: Truth({"y": plain}, {"y": exact}), Count(10**6, 10**3), **more)  # type: ignore[arg-type]


def test_a_wrong_variant_is_never_timed_and_a_broken_one_costs_only_its_row() -> None:
    log: list[str] = []
    found = measure(
        Row(case="case", variant="", dtype="float32"),
        [
            candidate("prompt", 1.0, log),
            candidate("wrong", 1.1, log),
            candidate("nan", math.nan, log),
            candidate("broken", -1.0, log),
            candidate("absent", 1.0, log, missing="no such chip"),
        ],
        timer=Timer(CPU, samples=3, warmup_ms=0),
        roofs=Roofs(1, 1, 1),
    )
    rows = {row.variant: row for row in found}
    assert {name: row.status for name, row in rows.items()} == {
        "prompt": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "absent": "skipped",
    }  # fmt: skip
    assert [log.count(name) for name in ("wrong", "nan")] == [1, 1]  # the first call, before the check
    assert all(rows[name].median_ms is None for name in ("wrong", "nan", "broken", "absent"))
    assert rows["broken"].reason == "RuntimeError: out of something"
    assert "allowed" in rows["wrong"].reason
    assert rows["prompt"].percent_of_floor == pytest.approx(100 * rows["prompt"].floor_ms / rows["prompt"].median_ms)  # type: ignore[operator]
    assert rows["prompt"].peak_memory_bytes is not None
    assert rows["prompt"].peak_memory_bytes >= 40


def measured(candidates: list[Candidate], **options: Any) -> list[Row]:
    template = Row(case="case", variant="", dtype="float32")
    timer = Timer(CPU, samples=3, warmup_ms=0)
    return measure(template, candidates, timer=timer, roofs=Roofs(1, 1, 1), **options)


def breaking(name: str, at: int, error: Exception) -> Candidate:
    """Right, until its run is called for the at-th time: the first call, the peak memory's, then the timer's."""
    sound = candidate(name, 1.0, [])
    calls = itertools.count(1)

    def call() -> None:
        if next(calls) >= at:
            raise error

    def build() -> tuple[dict[str, torch.Tensor], Run, int]:
        return {"y": sound.truth().plain["y"]}, Run([call]), 40

    return dataclasses.replace(sound, build=build)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_variant_that_breaks_when_it_is_timed_costs_only_its_row(at: int) -> None:
    rows = measured([breaking("broken", at, torch.OutOfMemoryError("no room")), candidate("sound", 1.0, [])])
    found = {row.variant: (row.status, row.reason) for row in rows}
    assert found == {"broken": ("failed", "OutOfMemoryError: no room"), "sound": ("ok", "")}
    assert rows[0].median_ms is None
    assert rows[1].median_ms is not None


def test_a_wrong_replay_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measured([breaking("graph", 3, WrongReplayError("0.5 off"))])
    assert (row.status, row.median_ms) == ("wrong", None)


@pytest.mark.parametrize("at", [1, 5])
def test_a_lost_device_ends_the_case_with_what_is_known(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_release", lambda device: False)
    never = candidate("after", 1.0, [], missing="not on this machine")
    with pytest.raises(BrokenDeviceError, match="after 'broken'") as caught:
        measured([never, breaking("broken", at, RuntimeError("illegal memory access")), candidate("sound", 1.0, [])])
    assert caught.value.variant == "broken"
    assert [(row.variant, row.status) for row in caught.value.rows] == [("after", "skipped"), ("broken", "failed")]


def test_a_lost_device_is_taken_at_its_word() -> None:
    with pytest.raises(BrokenDeviceError):
        measured([breaking("broken", 3, DeviceLostError("no capture works"))])


def test_a_replay_may_be_as_wrong_as_the_check_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer gets the row's own limit, times the layers that were not checked."""
    timed: list[Run] = []
    original = Timer.compare

    def compare(self: Timer, runs: Any, **options: Any) -> Any:
        timed.extend(runs.values())
        return original(self, runs, **options)

    monkeypatch.setattr(Timer, "compare", compare)
    sound = candidate("sound", 1.0, [])
    outputs, run, held = sound.build()
    deep = dataclasses.replace(run, replay_depth=16.0)
    (row,) = measured([dataclasses.replace(sound, build=lambda: (outputs, deep, held))])
    assert row.error_allowed is not None
    assert [run.replay_error for run in timed] == [16 * row.error_allowed]


def test_the_first_call_comes_before_the_check() -> None:
    order: list[str] = []
    sound = candidate("sound", 1.0, [])

    def build() -> tuple[Any, Run, int]:
        order.append("build")
        return (lambda: order.append("check") or sound.truth().plain), Run([lambda: order.append("call")]), 0  # type: ignore[func-returns-value]

    (row,) = measured([dataclasses.replace(sound, build=build)])
    assert order[:3] == ["build", "call", "check"]
    assert row.first_call_s is not None


def test_what_is_late_is_not_begun() -> None:
    begun: list[str] = []
    first, second = candidate("first", 1.0, begun), candidate("second", 1.0, begun)
    rows = measured([first, second], late=lambda: "first" in begun)
    assert [row.variant for row in rows] == ["first"]
    assert rows[0].status == "ok"


def test_held_bytes_counts_each_tensor_once() -> None:
    x, weights, parts = problem(torch.float32)
    expected = sum(t.nbytes for t in (x, *weights.tensors, *parts.tensors))
    assert held_bytes([weights, weights], parts, (x, None)) == expected
