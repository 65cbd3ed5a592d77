"""Prompts, tokens, data, recipe and score table of the ScienceQA example."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from science_questions import batches, data, prompts, score, training

from tests.examples.tiny_scienceqa import problems, tokenizer, write_data

PLAIN = data.Problem("7", "Which is  it?", ("red", "green"), 1, "A hint.", "", "social science", "grade3", None)


def test_the_prompt_is_the_official_one() -> None:
    assert prompts.prompt_of(PLAIN) == "Question: Which is it?\nContext: A hint.\nOptions: (A) red (B) green\nResponse:"
    assert prompts.answer_of(PLAIN) == "The answer is B."
    captioned = dataclasses.replace(PLAIN, caption="A square.")
    assert "\nContext: A hint. A square.\n" in prompts.prompt_of(captioned)
    assert "\nContext: N/A\n" in prompts.prompt_of(dataclasses.replace(PLAIN, hint=""))
    with pytest.raises(ValueError, match="6 choices; the prompt has letters for 5"):
        prompts.prompt_of(dataclasses.replace(PLAIN, choices=tuple("uvwxyz")))


def test_only_the_answer_is_learned() -> None:
    words = tokenizer()
    tokens = prompts.training_tokens(words, PLAIN, 128)
    assert tokens.ids[0] == words.bos_token_id
    assert tokens.ids[-1] == words.eos_token_id
    assert words.decode(tokens.ids[tokens.prompt :]) == "The answer is B . </s>"
    asked = prompts.question_tokens(words, PLAIN, 128)
    assert asked == tokens.ids[: len(asked)]
    assert words.decode(asked).endswith("Response : The answer is")


@pytest.mark.parametrize("limit", [40, 30, 24, 12])
def test_a_long_prompt_loses_its_context_and_keeps_its_end(limit: int) -> None:
    words = tokenizer()
    long = dataclasses.replace(PLAIN, hint="The thing is red. " * 30)
    asked = prompts.question_tokens(words, long, limit)
    assert len(asked) == limit
    text = words.decode(asked)
    assert text.startswith("<s>")
    assert text.endswith("Response : The answer is")
    if limit >= 24:
        assert "Question : Which" in text
        assert "Options : ( A ) red ( B ) green" in text
    learned = prompts.training_tokens(words, long, limit)
    assert len(learned.ids) == limit
    assert words.decode(learned.ids[learned.prompt :]) == "The answer is B . </s>"


def test_a_limit_that_leaves_no_question_is_refused() -> None:
    with pytest.raises(ValueError, match="limit of 3 tokens"):
        prompts.question_tokens(tokenizer(), PLAIN, 3)


def test_a_prompt_at_the_limit_is_left_alone() -> None:
    words = tokenizer()
    length = len(prompts.question_tokens(words, PLAIN, 512))
    assert prompts.question_tokens(words, PLAIN, length) == prompts.question_tokens(words, PLAIN, 512)


def test_pad_is_no_answer() -> None:
    words = tokenizer()
    assert words.pad_token_id is None
    assert prompts.pad_token(words) == words.unk_token_id
    words.pad_token = "A"
    assert prompts.pad_token(words) == words.unk_token_id
    words.pad_token = "</s>"
    assert prompts.pad_token(words) == words.eos_token_id
    words.pad_token, words.unk_token, words.eos_token = "A", "The", "."
    with pytest.raises(ValueError, match="add a pad token"):
        prompts.pad_token(words)


@pytest.mark.parametrize(("text", "choice"), [(" B.", 1), ("A", 0), ("b", -1), ("C.", -1), ("", -1), ("(B) A", 1)])
def test_the_choice_is_the_first_capital(text: str, choice: int) -> None:
    assert prompts.choice_in(text, PLAIN) == choice


def test_the_data_is_read_from_the_official_layout(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    train = data.load_split(root, "train", captions=True)
    assert [problem.id for problem in train] == [str(i) for i in range(1, 9)]
    assert train[0].caption == "A red square."
    assert train[0].image == root / "images" / "train" / "1" / "image.png"
    assert train[1].image is None
    assert train[1].caption == ""
    assert all(problem.caption == "" for problem in data.load_split(root, "train", captions=False))
    with pytest.raises(KeyError, match=r"no split 'val'.*\['test', 'train'\]"):
        data.load_split(root, "val", captions=True)


def test_pixels_are_normalized_as_the_official_code_does(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    path = data.load_split(root, "train", captions=False)[0].image
    assert path is not None
    pixels = data.read_image(path, 8)
    assert pixels.shape == (3, 8, 8)
    wanted = [(220 / 255 - 0.485) / 0.229, (30 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(pixels, torch.tensor(wanted).view(3, 1, 1).expand(3, 8, 8))


def test_batches_pad_to_the_right_side(tmp_path: Path) -> None:
    words = tokenizer()
    reader = batches.Reader(words, 64, 8)
    split = data.load_split(write_data(tmp_path / "data"), "train", captions=True)
    rows = batches.TrainingRows(reader, split)
    batch = reader.collate([rows[i] for i in range(len(rows))])
    assert [pixels is None for pixels in batch["pixel_values"]] == [problem.image is None for problem in split]
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (ids[length:] == words.unk_token_id).all()
        assert words.decode(labels[labels >= 0]).startswith("The answer is")
        assert (labels[length:] == -100).all()
        assert int((labels >= 0).sum()) == 6
    for part, inputs in batches.question_batches(reader, split, rows=5):
        assert (inputs["input_ids"][:, -1] == words.convert_tokens_to_ids("is")).all()
        assert (inputs["attention_mask"][:, -1] == 1).all()
        assert [pixels is None for pixels in inputs["pixel_values"]] == [problem.image is None for problem in part]


def test_the_recipe_is_the_papers(tmp_path: Path) -> None:
    from transformers import Trainer

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2).requires_grad_(False))
    arguments = training.Recipe(rows=4).arguments(tmp_path, 12726, 8, cpu=True)
    assert arguments.learning_rate == pytest.approx(1.125e-3)
    trainer = Trainer(model, arguments)
    trainer.create_optimizer_and_scheduler(20 * 397)
    assert trainer.optimizer is not None
    groups = [(len(g["params"]), g["weight_decay"], g["betas"]) for g in trainer.optimizer.param_groups]
    assert groups == [(1, 0.02, (0.9, 0.95)), (1, 0.0, (0.9, 0.95))]
    rates = []
    for _ in range(20 * 397):
        rates.append(trainer.optimizer.param_groups[0]["lr"] / 1.125e-3)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [rates[397 * epoch] for epoch in (0, 1, 2, 11)] == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_the_score_table(tmp_path: Path) -> None:
    root = write_data(tmp_path / "data")
    split = data.load_split(root, "train", captions=False) + data.load_split(root, "test", captions=False)
    wrong = {"1", "2", "6", "12"}
    predictions = {key: entry["answer"] if key not in wrong else -1 for key, entry in problems().items()}
    result = score.scores(split, predictions)
    assert result == {
        "NAT": 75.0,  # 1 4 7 10
        "SOC": 75.0,  # 2 5 8 11
        "LAN": 50.0,  # 3 6 9 12
        "TXT": pytest.approx(100 * 5 / 6),  # 3 4 7 8 11 12
        "IMG": pytest.approx(100 * 5 / 6),  # the odd ones
        "NO": pytest.approx(100 * 1 / 3),  # 2 6 10
        "G1-6": 50.0,
        "G7-12": pytest.approx(100 * 5 / 6),
        "Avg": pytest.approx(100 * 8 / 12),
    }
    head, _, figures = score.table(result).splitlines()
    assert head.split() == list(result)
    assert figures.split() == ["75.00", "75.00", "50.00", "83.33", "83.33", "33.33", "50.00", "83.33", "66.67"]
    assert score.scores(split[:1], {"1": 0})["SOC"] is None
    with pytest.raises(ValueError, match="11 of 12 problems have no prediction, the first is 2"):
        score.scores(split, {"1": 0})
