"""The parts of the easy-VQA example; the program itself runs in CI with --quick."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import easy_vqa as program
import pytest
import torch
from tiny_vqa import language_model, results, shapes, text, training
from tiny_vqa.methods import InMemory

WORDS = shapes.vocabulary()


@pytest.fixture(scope="module")
def test_split() -> shapes.Shapes:
    return shapes.load("test")


def truth(data: shapes.Shapes) -> dict[int, dict[str, str]]:
    """Of each image what the questions about its color and shape say."""
    found: dict[int, dict[str, str]] = {}
    for question, row in zip(*data.asked, strict=True):
        if question.kind in ("color", "shape"):
            assert found.setdefault(row, {}).setdefault(question.kind, question.answer) == question.answer
    return found


def test_the_rule_that_teaches_the_language_model_is_the_data_sets(test_split: shapes.Shapes) -> None:
    assert (len(test_split), len(test_split.asked.rows)) == (1000, 9673)
    known, checked = truth(test_split), Counter[str]()
    for question, row in zip(*test_split.asked, strict=True):
        if len(known.get(row, ())) == 2:
            assert shapes.answer(question.prompt.split(), **known[row]) == question.answer, question
            checked[question.kind] += 1
    assert min(checked[kind] for kind in shapes.KINDS) > 500


def test_held_out_images_keep_their_questions(test_split: shapes.Shapes) -> None:
    parts = shapes.held_out(test_split, images=100)
    assert [len(part) for part in parts] == [900, 100]
    known = truth(test_split)
    place = {image.numpy().tobytes(): row for row, image in enumerate(test_split.pixels)}
    asked = 0
    for part in parts:
        rows = [place[image.numpy().tobytes()] for image in part.pixels]
        assert all(told == known[rows[row]] for row, told in truth(part).items())
        asked += len(part.asked.rows)
    assert asked == 9673


@pytest.mark.parametrize("name", program.METHODS)
def test_a_method_is_calibrated_and_trains(name: str, test_split: shapes.Shapes) -> None:
    torch.manual_seed(0)
    base = language_model.build(WORDS, width=16, layers=2).eval()
    method = program.prepared(name, program.Setting(1e-2, 0.3), base, WORDS, test_split, seed=0)
    if isinstance(method, InMemory):
        asked = text.batch(WORDS, test_split.asked.questions[:16], answered=False)
        explained = method.model.explain_memory(
            asked.input_ids, asked.attention_mask, image_features=method.shown(test_split.features[:16])
        )
        assert torch.allclose(explained.shares().mean(dim=0), torch.tensor(0.3), atol=0.1)
    watched = text.Asked(test_split.asked.questions[:20], test_split.asked.rows[:20])
    run = training.train(
        [method],
        WORDS,
        test_split.features,
        shapes.batches(test_split, rows=8),
        steps=12,
        learning_rates=[1e-2],
        held_out=(test_split.features, watched),
        looks=1,
    )[0]
    assert sum(run.losses[-3:]) < sum(run.losses[:3])
    assert len(run.curve) == 1


def test_the_pages_show_the_committed_race() -> None:
    top = Path(__file__).resolve().parents[2]
    examples = top / "examples"
    committed: dict[str, Any] = json.loads((examples / "results" / "easy_vqa.json").read_text())
    by_kind = results.by_kind(committed)
    for page, wanted in ((examples, f"{results.markdown(committed)}\n\n{by_kind}"), (top, by_kind)):
        text = (page / "README.md").read_text()
        assert text.split("<!-- easy-vqa -->\n")[1].split("\n<!-- /easy-vqa -->")[0] == wanted
    assert not committed["commit"].endswith("-dirty")
    raced = committed["rows"][: len(program.METHODS)]
    assert [row["name"] for row in raced] == list(program.METHODS)
    assert all(row["steps"] == program.FULL.image_steps for row in raced)
    assert all(len(row["seeds"]) == program.FULL.seeds for row in raced)
