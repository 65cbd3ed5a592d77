"""Result files: what is refused, what the rows say of themselves, and that all committed ones are honest."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from harness.digest import machines
from harness.environment import environment, slug
from harness.presets import PRESETS
from harness.results import Results, Row, load, speedups
from harness.schema import SCHEMA, problems
from harness.timer import Timing

from tests.benchmarks.conftest import BENCHMARKS


def good_row(**fields: Any) -> Row:
    row = Row(case="model, first token", variant="prompt", dtype="float32", floor_ms=1.0, flops=10**9, bytes=10**6)
    assert row.judge(1e-7, 2e-7)
    row.take(Timing(tuple(2.0 + i / 100 for i in range(20)), "wall-clock", 1))
    for name, value in fields.items():
        setattr(row, name, value)
    return row


def good_document() -> dict[str, Any]:
    here: dict[str, Any] = dict.fromkeys(SCHEMA["properties"]["environment"]["required"], "x")
    results = Results(here)
    results.add([good_row(), good_row(variant="text")])
    return copy.deepcopy(results.document())


def test_a_good_document_passes() -> None:
    assert problems(good_document()) == []


@pytest.mark.parametrize("name", SCHEMA["properties"]["environment"]["required"])
def test_no_rows_without_their_environment(name: str) -> None:
    document = good_document()
    del document["environment"][name]
    assert problems(document) == [f"environment: {name} is missing"]
    document["environment"][name] = ""
    assert problems(document) == [f"environment.{name}: must not be empty"]


@pytest.mark.parametrize("name", SCHEMA["properties"]["rows"]["items"]["required"])
def test_no_row_without_its_fields(name: str) -> None:
    document = good_document()
    del document["rows"][1][name]
    assert f"rows[1]: {name} is missing" in problems(document)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"error": None}, "status ok without error"),
        ({"error_allowed": None}, "status ok without error_allowed"),
        ({"samples": None}, "status ok without samples"),
        ({"median_ms": None}, "status ok without median_ms"),
        ({"error": 1.0}, "over the allowed"),
        ({"p20_ms": 9.0}, "percentiles out of order"),
        ({"status": "wrong", "reason": "far off"}, "status wrong, but it gives median_ms"),
        ({"status": "skipped", "median_ms": None, "p20_ms": None, "p80_ms": None, "speedup_vs_prompt": None}, "without a reason"),
        ({"status": "fine"}, "wanted one of"),
        ({"median_ms": 0.0}, "wanted more than 0"),
        ({"error": math.nan}, "wanted a finite number"),
        ({"samples": 2.5}, "wanted integer or null"),
        ({"samples": True}, "wanted integer or null"),
        ({"flops": -1}, "wanted at least 0"),
        ({"case": ""}, "must not be empty"),
    ],
)  # fmt: skip
def test_rows_that_contradict_themselves_are_refused(changes: dict[str, Any], said: str) -> None:
    document = good_document()
    document["rows"][0].update(changes)
    assert any(said in text for text in problems(document)), problems(document)


def test_not_even_a_document() -> None:
    assert problems([]) == ["document: wanted object, got []"]
    assert problems({"environment": {}}) != []


def test_agrees_with_a_json_schema_validator() -> None:
    validator = pytest.importorskip("jsonschema", reason="jsonschema is optional").Draft202012Validator(SCHEMA)
    assert not list(validator.iter_errors(good_document()))
    broken = good_document()
    broken["rows"][0]["median_ms"] = -1
    assert list(validator.iter_errors(broken))


def test_a_wrong_row_says_wrong_and_gives_no_speed() -> None:
    row = Row(case="c", variant="v", dtype="float32")
    assert not row.judge(0.5, 1e-3)
    assert row.status == "wrong"
    assert row.median_ms is None
    nan = Row(case="c", variant="v", dtype="float32")
    assert not nan.judge(math.nan, 1e-3)
    assert nan.error is None
    assert not Row(case="c", variant="v", dtype="float32").judge(math.inf, math.inf)


def test_rates_and_speedups_follow_from_the_times() -> None:
    prompt, ours = good_row(), good_row(variant="factored-torch")
    ours.median_ms = prompt.median_ms / 4  # type: ignore[operator]
    speedups([prompt, ours])
    assert prompt.speedup_vs_prompt == 1
    assert ours.speedup_vs_prompt == 4
    assert ours.speedup_vs_text is None
    assert prompt.percent_of_floor == pytest.approx(100 / prompt.median_ms)  # type: ignore[operator]
    assert prompt.tflops == pytest.approx(1 / prompt.median_ms)  # type: ignore[operator]
    assert prompt.gbs == pytest.approx(1 / prompt.median_ms)  # type: ignore[operator]


def test_files_are_whole_after_every_case(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "latency.json"
    results = Results(good_document()["environment"], path)
    for case in ("a", "b"):
        results.add([good_row(case=case)])
        assert [row["case"] for row in load(path)["rows"]] == ["a", "b"][: len(results.rows)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["latency.json"]
    results.rows[0].status = "wrong"
    with pytest.raises(ValueError, match="do not meet the schema"):
        results.save()
    assert len(load(path)["rows"]) == 2  # the refused content did not reach the file


def test_reading_a_bad_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    document = good_document()
    document["rows"][0]["samples"] = None
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"latency\.json do not meet"):
        load(path)


def test_environment_names_machine_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from harness import commit as module

    found = environment(torch.device("cpu"), "latency")
    assert set(SCHEMA["properties"]["environment"]["required"]) <= set(found)
    assert found["torch"] == torch.__version__
    monkeypatch.setattr(module, "first_line", lambda command: None)  # a copy of the tree without git
    monkeypatch.delenv("MEMVP_COMMIT", raising=False)
    assert module.commit() == module.UNKNOWN_COMMIT
    monkeypatch.setenv("MEMVP_COMMIT", "0123456789abcdef")
    assert module.commit() == "0123456789abcdef"
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_committed_results_are_quotable() -> None:
    """Every file under benchmarks/results: schema, commit known, 20 samples, not interpreted."""
    for machine in machines(BENCHMARKS / "results"):
        for program, document in machine.documents.items():
            assert document["environment"]["program"] == program
            assert slug(document["environment"]["device"]) == machine.folder.name


def test_presets_are_models() -> None:
    for preset in PRESETS.values():
        assert preset.width % preset.heads == 0
        assert preset.heads % preset.kv_heads == 0
        assert preset.rank % 8 == 0
        assert preset.rank > preset.projector_width
