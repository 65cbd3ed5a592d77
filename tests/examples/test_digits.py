"""The parts of the digits example; the program itself runs in CI with --quick."""

from __future__ import annotations

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import digits as program
import pytest
import torch
from tiny_vqa import digits, language_model, results, text, training
from tiny_vqa.methods import InMemory, InPrompt, Method

WORDS = digits.vocabulary()
Split = tuple[digits.Images, digits.Images]


@pytest.fixture(scope="module")
def split() -> Split:
    return digits.load()


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    return language_model.build(WORDS, width=128, layers=4).eval()


def made(name: str, base: Any) -> Method:
    torch.manual_seed(1)
    if name == "memory":
        return InMemory("MemVP", copy.deepcopy(base), digits.MEMORY)
    return InPrompt(copy.deepcopy(base), WORDS, tokens=digits.TOKENS, vision_dim=digits.VISION_DIM)


@pytest.fixture(params=["memory", "prompt"])
def method(request: pytest.FixtureRequest, base: Any) -> Method:
    return made(request.param, base)


def test_the_split_is_whole_and_disjoint(split: Split) -> None:
    known, held_out = split
    assert (len(known), len(held_out)) == (1437, 360)
    rows = {tuple(pixels.flatten().tolist()) for pixels in known.pixels}
    assert len(rows) == 1437
    assert not any(tuple(pixels.flatten().tolist()) in rows for pixels in held_out.pixels)
    assert set(held_out.digits) == set(range(10))


def test_batches_pad_and_label() -> None:
    pair = [text.Question("which", "what digit is this ?", "six"), text.Question("even", "is it even ?", "yes")]
    learned = text.batch(WORDS, pair)
    assert learned.attention_mask.tolist() == [[1] * 7, [1] * 6 + [0]]
    assert [row[row >= 0].tolist() for row in learned.labels] == [
        [*WORDS.encode("six"), WORDS.end],
        [*WORDS.encode("yes"), WORDS.end],
    ]
    assert (learned.labels[1] == -100).tolist() == [True] * 4 + [False] * 2 + [True]
    asked = text.batch(WORDS, pair, answered=False)
    assert asked.attention_mask.tolist() == [[1] * 5, [0] + [1] * 4]
    assert (asked.labels == -100).all()


def test_a_method_trains_only_its_own_parameters(method: Method, split: Split) -> None:
    asked = next(digits.batches(split[0], rows=4))
    questions = text.batch(WORDS, asked.questions, places=method.places)
    method.loss(split[0].features[asked.rows], questions).backward()
    assert all(parameter.grad is not None for parameter in method.trained())
    assert any(parameter.grad.abs().max() > 0 for parameter in method.trained() if parameter.grad is not None)
    frozen = [p for p in method.parameters() if not p.requires_grad]
    untrained = language_model.build(WORDS, width=128, layers=4)
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in untrained.parameters())


def test_an_answer_depends_on_the_image_and_not_on_the_batch(method: Method, split: Split) -> None:
    features = split[0].features
    with torch.no_grad():
        for parameter in method.trained():
            parameter.add_(0.5 * torch.randn_like(parameter))
    questions = [digits.ask(random.Random(i), split[0].digits[i]) for i in range(6)]
    together = training.reply(method, WORDS, features, text.Asked(questions, list(range(6))))
    alone = [training.reply(method, WORDS, features, text.Asked([q], [row]))[0] for row, q in enumerate(questions)]
    assert together == alone
    one = text.Asked(questions[:1] * 40, list(range(40)))
    assert len(set(training.reply(method, WORDS, features, one))) > 1
    assert len(set(training.reply(method, WORDS, features, one, blind=True))) == 1


def test_every_method_trains_on_the_same(base: Any, split: Split) -> None:
    known, held_out = split
    few = digits.Images(held_out.pixels[:12], held_out.features[:12], held_out.digits[:12])
    methods = [made(name, base) for name in ("memory", "prompt")]
    before = [[p.detach().clone() for p in method.trained()] for method in methods]
    runs = training.train(
        methods,
        WORDS,
        known.features,
        digits.batches(known, rows=4),
        steps=4,
        learning_rates=[1e-3, 1e-3],
        held_out=(few.features, digits.one_each(few)),
        looks=2,
    )
    for run, method, start in zip(runs, methods, before, strict=True):
        assert len(run.losses) == len(run.seconds) == 4
        assert [step for step, _ in run.curve] == [2, 4]
        assert all(not torch.equal(a, b) for a, b in zip(method.trained(), start, strict=True))
    assert runs[0].tokens == runs[1].tokens > 0


def test_questions_are_about_their_image(split: Split) -> None:
    known, held_out = split
    asked = digits.about_every(held_out)
    assert len(asked.questions) == len(asked.rows) == 360 * len(digits.KINDS)
    several = [(asked, held_out), (digits.one_each(held_out), held_out)]
    several += [(one, known) for one in itertools.islice(digits.batches(known), 5)]
    for some, images in several:
        named = [(q, row) for q, row in zip(*some, strict=True) if q.kind == "which"]
        assert named
        assert all(q.answer == digits.NUMBERS[images.digits[row]] for q, row in named)


def test_the_page_shows_the_committed_run() -> None:
    top = Path(__file__).resolve().parents[2]
    committed = json.loads((top / "examples" / "results" / "digits.json").read_text())
    shown = (top / "examples" / "README.md").read_text().split("<!-- digits -->\n")[1].split("\n<!-- /digits -->")[0]
    assert shown == results.markdown(committed)
    assert not committed["commit"].endswith("-dirty")
    memory, prompt, _ = committed["rows"]
    assert memory["steps"] == prompt["steps"] == program.FULL.image_steps
