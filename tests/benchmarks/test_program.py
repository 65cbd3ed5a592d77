"""The frame around the programs: what is timed first, what is saved when, and how a run goes on after one that was cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import measure as measuring
from harness import program, stages
from harness.cli import Setting, common_parser, settle
from harness.measure import Candidate, Truth
from harness.parts import AGAIN
from harness.program import Job, run
from harness.results import Results, Row, load
from harness.rooflines import Count, Roofs
from harness.timer import Run

CPU = torch.device("cpu")
GPU = torch.device("cuda")
QUICK = ("--device", "cpu", "--quick", "--quiet", "--samples", "2", "--plot", "none")
ON_A_GPU = (
    "concatenated",
    "prompt",
    "text-compile",
    "factored-auto",
    "official-compile",
    "text",
    "liger",
    "official-eager",
    "plain-auto",
)


@pytest.fixture(autouse=True)
def _no_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure_roofs", lambda device, dtype, samples: Roofs(1.0, 1.0, 1.0))


def setting(path: Path | None, *more: str) -> Setting:
    options = common_parser("", program="latency").parse_args([*QUICK, "--json", str(path or "none"), *more])
    return settle(options, cpu={}, cuda={})


def candidate(name: str, call: Callable[[], object] = lambda: None, **more: Any) -> Candidate:
    y = {"y": torch.ones(3)}
    return Candidate(name, lambda: (y, Run([call]), 0), lambda: Truth(y, {"y": y["y"].double()}), Count(1, 1), **more)


def job(case: str, *candidates: Candidate) -> Job:
    return Job(Row(case=case, variant="", dtype="float32"), lambda: [dataclasses.replace(c) for c in candidates])


def test_what_every_claim_rests_on_is_timed_first_and_compilations_last_one_by_one() -> None:
    candidates = [candidate(name) for name in ON_A_GPU]
    groups = [[[c.name for c in group] for group in stages.groups(stage, candidates, GPU)] for stage in range(3)]
    assert groups == [
        [["prompt", "factored-auto", "text", "official-eager"]],
        [["concatenated", "liger", "plain-auto"]],
        [["text-compile"], ["official-compile"]],
    ]
    on_a_cpu = [[[c.name for c in group] for group in stages.groups(stage, candidates, CPU)] for stage in range(3)]
    assert on_a_cpu[0] == [["concatenated", "prompt", "factored-auto", "text", "liger", "official-eager", "plain-auto"]]
    assert on_a_cpu[1] == []


def test_all_cases_have_their_essential_rows_before_any_has_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    saved: list[list[tuple[str, str]]] = []
    original = Results.save

    def save(self: Results) -> None:
        original(self)
        saved.append([(row["case"], row["variant"]) for row in load(path)["rows"]])

    monkeypatch.setattr(Results, "save", save)
    names = ("prompt", "factored-torch", "prompt-compile", "text-compile")
    jobs = [job(case, *map(candidate, names)) for case in ("a", "b")]
    results, left_out = run("latency", setting(path), jobs)
    assert left_out == []
    essential = [(case, name) for case in "ab" for name in names[:2]]
    assert [len(rows) for rows in saved] == [2, 4, 5, 6, 7, 8]
    assert saved[1] == essential
    compiled = [row for row in results.rows if row.variant.endswith("-compile")]
    assert [(row.case, row.variant) for row in compiled] == [(case, name) for case in "ab" for name in names[2:]]
    assert all(row.beside_ms is not None for row in compiled)  # ours ran beside each of them
    assert all(row.beside_ms is None for row in results.rows if row not in compiled)


def test_speedups_are_over_the_faster_of_eager_and_compiled() -> None:
    medians = {"prompt": 8.0, "prompt-compile": 4.0, "text": 2.0, "factored-torch": 1.0}
    results = Results({})
    results.save = lambda: None  # type: ignore[method-assign]
    for name, median in medians.items():  # the compiled ones come later, as in a run
        results.add([Row(case="c", variant=name, dtype="float32", median_ms=median)])
    found = {row.variant: row.speedup_vs_prompt for row in results.rows}
    assert found == {"prompt": 0.5, "prompt-compile": 1.0, "text": 2.0, "factored-torch": 4.0}
    assert results.rows[-1].speedup_vs_text == 2.0


def test_when_the_time_is_up_what_is_missing_is_named(tmp_path: Path) -> None:
    now = [0.0]
    jobs = [
        job("a", candidate("prompt", lambda: now.__setitem__(0, 9.0)), candidate("prompt-compile")),
        job("b", candidate("prompt")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.time, "monotonic", lambda: now[0])
        results, left_out = run("latency", setting(tmp_path / "rows.json", "--seconds", "5"), jobs)
    assert [(row.case, row.variant) for row in results.rows] == [("a", "prompt")]
    assert left_out == ["b", "a: some variants"]


def test_a_variant_that_loses_the_device_is_left_out_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    lost = [False]
    calls: list[str] = []

    def breaks() -> None:
        calls.append("bad")
        lost[0] = True
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measuring, "_release", lambda device: not lost[0])
    jobs = [job(case, candidate("prompt"), candidate("bad", breaks), candidate("text")) for case in ("a", "b")]
    with pytest.raises(SystemExit) as caught:
        run("latency", setting(path), jobs)
    assert caught.value.code == AGAIN
    assert "illegal memory access" in capsys.readouterr().err
    assert [(row["variant"], row["status"]) for row in load(path)["rows"]] == [("bad", "failed")]
    lost[0] = False  # a new process
    results, left_out = run("latency", setting(path, "--continue"), jobs)
    assert left_out == []
    found = {(row.case, row.variant): row.status for row in results.rows}
    assert found == {
        ("a", "bad"): "failed", ("a", "prompt"): "ok", ("a", "text"): "ok",
        ("b", "bad"): "skipped", ("b", "prompt"): "ok", ("b", "text"): "ok",
    }  # fmt: skip
    assert calls == ["bad"]
    assert "unusable in 'a'" in next(row.reason for row in results.rows if row.status == "skipped")
    assert len(load(path)["rows"]) == 6


def test_going_on_measures_what_is_missing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    run("latency", setting(path), [job("a", candidate("prompt"))])
    begun: list[str] = []
    jobs = [
        job("a", candidate("prompt", lambda: begun.append("prompt")), candidate("text", lambda: begun.append("text")))
    ]
    results, _ = run("latency", setting(path, "--continue"), jobs)
    assert [row.variant for row in results.rows] == ["prompt", "text"]
    assert set(begun) == {"text"}
    monkeypatch.setattr("harness.environment.commit", lambda: "f" * 40)
    with pytest.raises(ValueError, match="its commit is"):
        run("latency", setting(path, "--continue"), jobs)


def test_a_missing_package_is_said_once(tmp_path: Path) -> None:
    def absent() -> list[Candidate]:
        raise ImportError("No module named 'transformers'")

    results, left_out = run(
        "latency", setting(tmp_path / "rows.json"), [dataclasses.replace(job("a"), candidates=absent)]
    )
    assert [(row.variant, row.status, row.reason) for row in results.rows] == [
        ("all", "skipped", "No module named 'transformers'")
    ]
    assert left_out == []


def test_inference_runs_without_gradients(tmp_path: Path) -> None:
    seen: list[bool] = []
    one = job("a", candidate("prompt", lambda: seen.append(torch.is_grad_enabled())))
    run("latency", setting(tmp_path / "rows.json"), [dataclasses.replace(one, gradients=False)])
    assert set(seen) == {False}
