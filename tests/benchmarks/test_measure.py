"""The check before the time: right variants pass, every way of being wrong is noticed, and what breaks costs only its own row."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure as measuring
import pytest
import timing
import torch
from measure import AGAIN, Built, Candidate, Case, LostDeviceError, Truth, judge, measure, run
from options import Setting, parser, settle
from roofline import Count, Peaks
from rows import Row
from timing import Sampler, WrongReplayError
from variants import Variant, by_implementation, exact_ffn, factored_joined, join, pytorch_of, variants
from workload import PRESETS, Adapter, Factors, Weights, hidden_states

CPU = torch.device("cpu")
PRESET = PRESETS["smallest"]
ALL = variants(CPU, compiled=False)
ALL["factored-joined"] = Variant("factored-joined", "factored", factored_joined, join)
MEMORY = [name for name, variant in ALL.items() if variant.has_memory and variant.missing(CPU) is None]


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, Weights, Factors]:
    adapter = Adapter(PRESET, slots=PRESET.slots, device=CPU)
    factors = adapter.factors(adapter.batch(3, 17), dtype=dtype).map(torch.Tensor.detach)
    weights = Weights.random(PRESET, device=CPU, dtype=dtype, seed=1)
    return hidden_states(3, 11, PRESET.width, device=CPU, dtype=dtype), weights, factors


def compute(name: str, x: torch.Tensor, weights: Weights, factors: Factors) -> dict[str, torch.Tensor]:
    variant = ALL[name]
    bound = variant.bind(weights, variant.share(factors)) if variant.has_memory else None
    return {"y": variant.step(x, weights, bound, 0.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEMORY)
def test_every_variant_computes_the_same_function(name: str, dtype: torch.dtype) -> None:
    given = problem(dtype)
    error, allowed = judge(compute(name, *given), compute(pytorch_of(ALL[name].form), *given), {"y": exact_ffn(*given)})
    assert error <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_memories_do_not_pass(dtype: torch.dtype) -> None:
    """None at all, another image's, one slot short: each is far outside what is allowed."""
    x, weights, factors = problem(dtype)
    short = dataclasses.replace(factors, value_position=factors.value_position.clone())
    short.value_position[-1] = 0
    other = dataclasses.replace(factors, core=factors.core.roll(1, 0))
    plain, exact = compute("factored-eager", x, weights, factors), {"y": exact_ffn(x, weights, factors)}
    for name, memory in (("text", factors), ("factored-eager", other), ("factored-eager", short)):
        error, allowed = judge(compute(name, x, weights, memory), plain, exact)
        assert error > 2 * allowed


def candidate(name: str, call: Callable[[], object] = lambda: None, *, factor: float = 1.0, **more: Any) -> Candidate:
    exact = torch.arange(1.0, 9.0, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-6)
    built = Built(lambda: {"y": plain * factor}, [call], held=40)
    return Candidate(name, lambda: built, lambda: Truth({"y": plain}, {"y": exact}), Count(10**6, 10**3), **more)


def case(name: str, *candidates: Candidate, **more: Any) -> Case:
    return Case(
        Row(case=name, variant="", dtype="float32"), lambda: [dataclasses.replace(c) for c in candidates], **more
    )


def measured(*candidates: Candidate, **more: Any) -> dict[str, Row]:
    rows = measure(case("case"), candidates, device=CPU, samples=3, peaks=Peaks(1, 1, 1), **more)
    return {row.variant: row for row in rows}


def test_a_wrong_variant_is_never_timed_and_a_broken_one_costs_only_its_row() -> None:
    log: list[str] = []

    def breaks() -> Built:
        raise RuntimeError("out of something\nsecond line")

    rows = measured(
        candidate("prompt"),
        candidate("wrong", lambda: log.append("wrong"), factor=1.1),
        candidate("nan", lambda: log.append("nan"), factor=math.nan),
        dataclasses.replace(candidate("broken"), build=breaks),
        candidate("absent", missing="no such chip"),
    )
    assert {name: row.status for name, row in rows.items()} == {
        "prompt": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "absent": "skipped",
    }  # fmt: skip
    assert log == ["wrong", "nan"]  # the first call, before the check
    assert all(rows[name].median_ms is None for name in ("wrong", "nan", "broken", "absent"))
    assert rows["broken"].reason == "RuntimeError: out of something"
    assert "allowed" in rows["wrong"].reason
    prompt: Any = rows["prompt"]
    assert prompt.percent_of_roofline == pytest.approx(100 * prompt.roofline_ms / prompt.median_ms)
    assert prompt.peak_memory_bytes >= 40


def at_call(number: int, error: Exception) -> Callable[[], None]:
    """Right, until it is called for the n-th time: the first call, the peak memory's, then the timer's."""
    calls = itertools.count(1)

    def call() -> None:
        if next(calls) >= number:
            raise error

    return call


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_variant_that_breaks_when_it_is_timed_costs_only_its_row(number: int) -> None:
    rows = measured(candidate("broken", at_call(number, torch.OutOfMemoryError("no room"))), candidate("sound"))
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "OutOfMemoryError: no room")
    assert rows["broken"].median_ms is None
    assert rows["sound"].median_ms is not None


def test_what_is_not_there_or_replays_wrongly_is_called_so() -> None:
    absent = RuntimeError("backend: wanted 'cuda', but it has no backward")
    rows = measured(
        candidate("absent", at_call(1, absent)), candidate("graph", at_call(3, WrongReplayError("0.5 off")))
    )
    assert [rows[name].status for name in ("absent", "graph")] == ["skipped", "wrong"]


def test_samples_are_interleaved_and_operands_used_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_S", 0)
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE_S", {"cpu": 1e-12})
    taken: list[str] = []
    names = {name: [lambda n=n, name=name: taken.append(f"{name}{n}") for n in range(2)] for name in "ab"}
    samplers = [Sampler(calls, CPU, graph=True, replay_error=math.inf) for calls in names.values()]
    assert taken == ["a0", "a1", "b0", "b1"]  # all operands once, untimed
    del taken[:]
    order = [candidate(name, lambda name=name: taken.append(name)) for name in "ab"]
    measured(*order)
    assert taken[-6:] == ["a", "b", "b", "a", "a", "b"]  # another variant begins every round
    assert samplers[0].sample() >= 0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setting]:
    monkeypatch.setattr(measuring, "measure_peaks", lambda device, dtype, samples: Peaks(1.0, 1.0, 1.0))

    def make(*more: str) -> Setting:
        quick = ("--device", "cpu", "--quick", "--quiet", "--samples", "2", "--json", str(tmp_path / "rows.json"))
        return settle(parser("", program="latency").parse_args([*quick, *more]), cpu={}, cuda={})

    return make


def test_a_variant_that_loses_the_device_is_left_out_of_the_rest(
    settings: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, calls = [False], []

    def breaks() -> None:
        calls.append("bad")
        lost[0] = True
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measuring, "_usable", lambda device: not lost[0])
    cases = [case(name, candidate("prompt"), candidate("bad", breaks), candidate("text")) for name in ("a", "b")]
    with pytest.raises(LostDeviceError, match="after 'bad'"):
        measured(*cases[0].candidates())
    with pytest.raises(SystemExit) as caught:
        run(settings(), cases)
    assert caught.value.code == AGAIN
    assert "illegal memory access" in capsys.readouterr().err
    lost[0] = False  # a new process
    results, left_out = run(settings("--continue"), cases)
    assert left_out == []
    found = {(row.case, row.variant): row.status for row in results.rows}
    assert found == {
        ("a", "bad"): "failed", ("a", "prompt"): "ok", ("a", "text"): "ok",
        ("b", "bad"): "skipped", ("b", "prompt"): "ok", ("b", "text"): "ok",
    }  # fmt: skip
    assert calls == ["bad", "bad"]
    assert len(json.loads((settings().json or Path()).read_text())["rows"]) == 6


@pytest.mark.gpu
def test_a_graph_that_replays_something_else_is_wrong() -> None:
    device, turn = torch.device("cuda", torch.cuda.current_device()), itertools.count()
    x = torch.ones(1024, device=device)
    sampler = Sampler([lambda: x * 2], device, graph=True, replay_error=1e-3)
    assert (sampler.method, sampler.note) == ("cuda-graph", "")
    assert sampler.sample() > 0
    with pytest.raises(WrongReplayError):
        Sampler([lambda: x * next(turn)], device, graph=True, replay_error=1e-3)
    sampler = Sampler([lambda: x.sum().item()], device, graph=True, replay_error=1e-3)
    assert sampler.method == "wall-clock"
    assert "no CUDA graph" in sampler.note


def test_a_named_implementation_computes_the_backward_too() -> None:
    """Which runs after the step has returned, and again for every timed call."""
    gemm: Any = pytest.importorskip("memvp_kernels.backends.triton.gemm")
    seen: list[str | None] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(gemm._override)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            seen.append(gemm._override)
            return 2 * grads[0]

    names = list(gemm.IMPLEMENTATIONS)
    x = torch.ones(3, requires_grad=True)
    outputs = [by_implementation(lambda x, *_: Double.apply(x), name)(x, None, None, 0.0) for name in names]  # type: ignore[arg-type,return-value]
    for y in (*outputs, *outputs):
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert seen == [*names] * 3
    assert gemm._override is None
