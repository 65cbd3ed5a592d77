"""The predictions: no faster than the floor, the note's tables as the model has them now."""

from __future__ import annotations

import itertools
from pathlib import Path

import predictions
import pytest
from harness.predictions import CASES, Case, predict

pytest.importorskip("triton")
from memvp_kernels.backends.triton import roads

NOTE = Path(__file__).resolve().parents[2] / "docs" / "notes" / "predictions.md"


@pytest.mark.parametrize("form", ["factored", "formed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_prediction(case: Case, form: str) -> None:
    found = {road: predict(case, form, road) for road in roads.ROADS}
    chosen = predict(case, form, "chosen")
    for prediction in (*found.values(), chosen):
        assert prediction.total > prediction.floor > 0
        assert all(time > 0 for time in prediction.steps.values())
    assert set(chosen.taken.values()) <= set(roads.CHOSEN_FROM)
    assert chosen.total <= min(found[road].total for road in roads.CHOSEN_FROM)


def test_more_rows_take_longer() -> None:
    for form, road in itertools.product(("factored", "formed"), (*roads.ROADS, "chosen")):
        totals = [predict(Case(n // 512, 512, training=False), form, road).total for n in (512, 1024, 4096, 8192)]
        assert totals == sorted(totals)


def test_the_floor_is_the_known_one() -> None:
    """LLaMA-7B's factored memory at N = 8192: 2216 GFLOP of the FFN and 69 of the memory, at 790 TFLOP/s."""
    assert predict(CASES[3], "formed", "fused").floor == pytest.approx(2860, rel=0.005)
    assert predict(CASES[4], "formed", "fused").floor == pytest.approx(2914, rel=0.005)


def test_the_note_is_up_to_date() -> None:
    note = NOTE.read_text()
    assert predictions.renewed(note) == note, f"python benchmarks/predictions.py --renew {NOTE.name} renews its tables"


def test_the_program_renews_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = tmp_path / "note.md"
    note.write_text("before <!-- predictions: begin --> old <!-- predictions: end --> after")
    assert predictions.main(["--renew", str(note)]) == 0
    printed = capsys.readouterr().out
    assert "training backward, N = 8192" in printed
    assert note.read_text().startswith("before ")
    assert note.read_text().endswith(" after")
    assert printed.strip() in note.read_text()
