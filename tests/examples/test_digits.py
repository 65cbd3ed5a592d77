"""The parts of the digits example; the program itself runs in CI with --quick."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import digits
import pytest
import torch
from digit_questions import images, language_model, questions, results, training
from digit_questions.methods import InMemory, InPrompt, Method

WORDS = questions.Vocabulary()


@pytest.fixture(scope="module")
def split() -> tuple[images.Images, images.Images]:
    return images.load()


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    return language_model.build(WORDS).eval()


@pytest.fixture(params=["memory", "prompt"])
def method(request: pytest.FixtureRequest, base: Any) -> Method:
    torch.manual_seed(1)
    if request.param == "memory":
        return InMemory(copy.deepcopy(base))
    return InPrompt(copy.deepcopy(base), WORDS)


def test_the_split_is_whole_and_disjoint(split: tuple[images.Images, images.Images]) -> None:
    known, held_out = split
    assert (len(known), len(held_out)) == (1437, 360)
    rows = {tuple(pixels.flatten().tolist()) for pixels in known.pixels}
    assert len(rows) == 1437
    assert not any(tuple(pixels.flatten().tolist()) in rows for pixels in held_out.pixels)
    assert set(held_out.digits) == set(range(10))


def test_patches_are_cut_row_by_row(split: tuple[images.Images, images.Images]) -> None:
    known, held_out = split
    both = torch.cat([known.pixels, held_out.pixels])
    patch = known.features[3].view(images.GRID, images.GRID, images.PATCH, images.PATCH)[2, 1]
    torch.testing.assert_close(patch * both.std() + both.mean(), known.pixels[3, 2:6, 1:5])


@pytest.mark.parametrize(
    ("kind", "digit", "operand", "answer"),
    [
        ("which", 7, 0, "seven"),
        ("plus", 9, 5, "fourteen"),
        ("twice", 9, 0, "eighteen"),
        ("to ten", 0, 0, "ten"),
        ("even", 0, 0, "yes"),
        ("even", 3, 0, "no"),
        ("more", 4, 4, "no"),
        ("more", 5, 4, "yes"),
    ],
)
def test_answers(kind: str, digit: int, operand: int, answer: str) -> None:
    assert questions.KINDS[kind].answer(digit, operand) == answer


def test_every_question_can_be_written_and_read_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        question = questions.ask(rng, rng.randrange(10), questions.IMAGE)
        ids = WORDS.encode(f"{question.prompt} {question.answer} {questions.END}")
        assert WORDS.decode(ids) == f"{question.prompt} {question.answer}"
    assert len(set(WORDS.words)) == len(WORDS)


def test_batches_pad_and_label() -> None:
    pair = [
        questions.Question("which", "what digit is this ?", "six"),
        questions.Question("even", "is it even ?", "yes"),
    ]
    learned = questions.batch(WORDS, pair)
    assert learned.attention_mask.tolist() == [[1] * 7, [1] * 6 + [0]]
    assert [row[row >= 0].tolist() for row in learned.labels] == [
        [*WORDS.encode("six"), WORDS.end],
        [*WORDS.encode("yes"), WORDS.end],
    ]
    assert (learned.labels[1] == -100).tolist() == [True] * 4 + [False] * 2 + [True]
    asked = questions.batch(WORDS, pair, answered=False)
    assert asked.attention_mask.tolist() == [[1] * 5, [0] + [1] * 4]
    assert (asked.labels == -100).all()


def test_a_method_trains_only_its_own_parameters(method: Method, split: Any) -> None:
    known, _ = split
    asked = questions.batch(WORDS, [questions.ask(random.Random(i), known.digits[i], method.shown) for i in range(4)])
    method.loss(known.features[:4], asked).backward()
    assert all(parameter.grad is not None for parameter in method.trained())
    assert any(parameter.grad.abs().max() > 0 for parameter in method.trained() if parameter.grad is not None)
    frozen = [p for p in method.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in language_model.build(WORDS).parameters())


def test_an_answer_depends_on_the_image_and_not_on_the_batch(method: Method, split: Any) -> None:
    known, _ = split
    with torch.no_grad():
        for parameter in method.trained():
            parameter.add_(0.5 * torch.randn_like(parameter))
    asked = [questions.ask(random.Random(i), known.digits[i], method.shown) for i in range(6)]
    together = training.reply(method, WORDS, known, asked, range(6))
    alone = [training.reply(method, WORDS, known, [question], [row])[0] for row, question in enumerate(asked)]
    assert together == alone
    one = asked[:1] * 40
    assert len(set(training.reply(method, WORDS, known, one, range(40)))) > 1
    assert len(set(training.reply(method, WORDS, known, one, range(40), blind=True))) == 1


def test_visual_tokens_stand_where_the_prompt_has_places(base: Any, split: Any) -> None:
    known, _ = split
    method = InPrompt(copy.deepcopy(base), WORDS)
    asked = [questions.ask(random.Random(i), 1, method.shown, kind) for i, kind in enumerate(("even", "plus"))]
    prompts = questions.batch(WORDS, asked, answered=False)
    embeds = method.embed(known.features[:2], prompts.input_ids)
    for row in range(2):
        places = prompts.input_ids[row] == WORDS.image
        tokens = method.projector(known.features[row]) + method.position
        torch.testing.assert_close(embeds[row, places], tokens)
        words = base.get_input_embeddings()(prompts.input_ids[row, ~places])
        torch.testing.assert_close(embeds[row, ~places], words)


def test_every_method_trains_on_the_same(base: Any, split: Any) -> None:
    known, held_out = split
    few = images.Images(held_out.pixels[:12], held_out.features[:12], held_out.digits[:12])
    methods: list[Method] = [
        InMemory(copy.deepcopy(base)),
        InPrompt(copy.deepcopy(base), WORDS),
    ]
    before = [[p.detach().clone() for p in method.trained()] for method in methods]
    runs = training.train(methods, WORDS, known, few, steps=4, rows=4, learning_rate=1e-3, looks=2)
    for run, method, start in zip(runs, methods, before, strict=True):
        assert len(run.losses) == len(run.seconds) == 4
        assert [step for step, _ in run.curve] == [2, 4]
        assert all(not torch.equal(a, b) for a, b in zip(method.trained(), start, strict=True))
    assert runs[0].tokens == runs[1].tokens > 0


def test_held_out_questions_are_the_same_for_every_method(split: Any) -> None:
    _, held_out = split
    first, rows = training.held_out_questions(held_out, "X")
    second, _ = training.held_out_questions(held_out, "Y Y")
    assert [q.prompt.replace("X", "Y Y") for q in first] == [q.prompt for q in second]
    assert len(first) == len(rows) == 360 * len(questions.KINDS)
    for question, row in zip(first, rows, strict=True):
        if question.kind == "which":
            assert question.answer == questions.NUMBERS[held_out.digits[row]]


def test_the_score_counts_per_kind() -> None:
    asked = [questions.Question(kind, "", "yes") for kind in questions.KINDS] + [questions.Question("plus", "", "two")]
    answers = ["yes"] * 3 + ["no"] * 3 + ["two"]
    assert results.score(asked, answers) == {
        "all": 4 / 7, "which": 1.0, "plus": 1.0, "twice": 1.0, "to ten": 0.0, "even": 0.0, "more": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "prompt", "blind", "ratio", "met"),
    [
        (0.94, 0.95, 0.2, 0.6, True),
        (0.92, 0.92, 0.2, 0.6, False),
        (0.94, 0.97, 0.2, 0.6, False),
        (0.94, 0.95, 0.5, 0.6, False),
        (0.94, 0.95, 0.2, 0.8, False),
    ],
    ids=["met", "too few right", "too far behind", "the image hardly matters", "too slow"],
)
def test_each_requirement_can_be_missed(
    memory: float, prompt: float, blind: float, ratio: float, met: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [training.Run("MemVP", seconds=[ratio]), training.Run("prompt", seconds=[1.0])]
    assert digits.meets(digits.FULL, [{"all": memory}, {"all": prompt}], {"all": blind}, runs) is met
    assert ("MISSED" in capsys.readouterr().out) is not met


def test_the_page_shows_the_committed_run() -> None:
    top = Path(__file__).resolve().parents[2]
    committed = json.loads((top / "examples" / "results" / "digits.json").read_text())
    shown = (top / "examples" / "README.md").read_text().split("<!-- digits -->\n")[1].split("\n<!-- /digits -->")[0]
    assert shown == results.markdown(committed)
    assert not committed["commit"].endswith("-dirty")
    memory, prompt, _ = committed["rows"]
    assert memory["steps"] == prompt["steps"] == digits.FULL.image_steps
