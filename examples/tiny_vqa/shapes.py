"""easy-VQA: 5,000 images of one coloured shape each (64 × 64 pixels) with 48,000 questions, split as published."""

from __future__ import annotations

import importlib.metadata
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiny_vqa.text import IMAGE, Asked, Question, Vocabulary

__all__ = ["KINDS", "Shapes", "answer", "batches", "held_out", "lesson", "load", "majority", "vocabulary"]

# the package's folder, not the package: a program named easy_vqa stands beside this one
_FOLDER = Path(str(importlib.metadata.distribution("easy-vqa").locate_file("easy_vqa"))) / "data"

PATCH = 8
"""Width of a patch."""
GRID = 64 // PATCH
"""Patches along each side of an image."""

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("color", "shape", "color, yes or no", "shape, yes or no")


class Shapes(NamedTuple):
    """One side of a split.

    Attributes:
        pixels: (n, 64, 64, 3), 0 to 1.
        features: (n, GRID², 3·PATCH²), the patches row by row, standardised.
        asked: the questions, as published, and the image of each.
    """

    pixels: Tensor
    features: Tensor
    asked: Asked

    def __len__(self) -> int:
        return len(self.pixels)


def load(split: str) -> Shapes:
    """The published "train" (4,000 images) or "test" split (1,000)."""
    published = _read(split)
    images = [_FOLDER / split / "images" / f"{i}.png" for i in range(1 + max(row for _, _, row in published))]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in images])).float() / 255
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (n, GRID, GRID, 3, PATCH, PATCH)
    features = (patches.reshape(len(pixels), GRID**2, -1) - 0.88) / 0.19  # the training images' mean and deviation
    asked = Asked([question(text, right) for text, right, _ in published], [row for _, _, row in published])
    return Shapes(pixels, features, asked)


def _read(split: str) -> list[tuple[str, str, int]]:
    """Question, answer and image, as published."""
    return [tuple(entry) for entry in json.loads((_FOLDER / split / "questions.json").read_text())]


def question(text: str, answer: str, shown: str = IMAGE) -> Question:
    """A published question, then the place of the image, or a description in words."""
    text = text.replace("?", " ?")
    return Question(kind(text.split()), f"{text} this is {shown} . answer", answer)


def kind(words: Sequence[str]) -> str:
    """Which of :data:`KINDS` a question is."""
    if "what" in words:
        return KINDS["color" not in words]
    return KINDS[2 + any(shape in words for shape in SHAPES)]


def answer(words: Sequence[str], color: str, shape: str) -> str | None:
    """What is true of a shape; None where the question supposes another, as "what color is the circle?" may."""
    named = [word for word in words if word in COLORS + SHAPES]
    true = all(word in (color, shape) for word in named)
    if "what" not in words:
        return "yes" if true != ("not" in words or "no" in words) else "no"
    return (color if kind(words) == "color" else shape) if true else None


_TEXTS = sorted({text.replace("?", " ?") for text, _, _ in _read("train")})
_PHRASES = {each: [text.split() for text in _TEXTS if kind(text.split()) == each] for each in KINDS}
_OFTEN = (*KINDS, KINDS[2], KINDS[2], KINDS[3])  # yes and no have the most to learn
_NEGATED_FROM = 0.35


def vocabulary() -> Vocabulary:
    """Every word of a question, a description or an answer."""
    asked = {word for phrases in _PHRASES.values() for words in phrases for word in words}
    return Vocabulary(asked | {*COLORS, *SHAPES, "yes", "no", "this", "is", "a", ".", "answer"})


def lesson(rng: random.Random, done: float, rows: int = 48) -> list[Question]:
    """Questions about shapes that the text describes: ``is there a blue shape ? this is a red circle . answer no``.

    Yes and no are as frequent, whatever is asked. "Is there not …" takes a comparison and its negation, which is too much
    to begin with: it comes when a third of the training is done.

    Args:
        rng: chooses shapes and questions.
        done: how far the training is, 0 to 1.
        rows: how many.
    """
    return [_told(rng, negated=done >= _NEGATED_FROM) for _ in range(rows)]


def _told(rng: random.Random, *, negated: bool) -> Question:
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    order = [color, shape]
    rng.shuffle(order)
    each = rng.choice(_OFTEN)
    while True:
        words = rng.choice(_PHRASES[each])
        if each in KINDS[2:]:
            true, all_of_it = (color, COLORS) if each == KINDS[2] else (shape, SHAPES)
            named = true if rng.random() < 0.5 else rng.choice([other for other in all_of_it if other != true])
            words = [named if word in all_of_it else word for word in words]
        right = answer(words, color, shape)
        if right is not None and (negated or not {"not", "no"} & set(words)):
            return Question(each, f"{' '.join(words)} this is a {' '.join(order)} . answer", right)


def held_out(data: Shapes, images: int = 500, seed: int = 0) -> tuple[Shapes, Shapes]:
    """Training images parted in two, those to learn from and ``images`` to choose settings by."""
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    return _part(data, order[images:]), _part(data, order[:images])


def _part(data: Shapes, chosen: Sequence[int]) -> Shapes:
    place = {row: i for i, row in enumerate(chosen)}
    kept = [(q, place[row]) for q, row in zip(*data.asked, strict=True) if row in place]
    return Shapes(data.pixels[chosen], data.features[chosen], Asked([q for q, _ in kept], [row for _, row in kept]))


def batches(data: Shapes, *, rows: int = 32, seed: int = 0) -> Iterator[Asked]:
    """Training batches without end: published questions, each kind as often, and to each question every answer as often.

    As published, 87 of 100 questions whether a color is there have the answer that needs no image.
    """
    groups: dict[str, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, asked in enumerate(data.asked.questions):
        groups[asked.kind][asked.prompt, asked.answer].append(i)
    rng = random.Random(seed)
    while True:
        picks = [rng.choice(rng.choice(list(groups[rng.choice(KINDS)].values()))) for _ in range(rows)]
        yield Asked([data.asked.questions[i] for i in picks], [data.asked.rows[i] for i in picks])


def majority(known: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """The answers of who sees no image: to each question's text the one that it has most often in ``known``."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in known:
        counts[one.prompt][one.answer] += 1
    return [counts[one.prompt].most_common(1)[0][0] for one in asked]
