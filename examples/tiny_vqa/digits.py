"""scikit-learn's 1,797 handwritten digits (8 × 8 pixels), and questions about them that take arithmetic."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from memvp_kernels import MemVPConfig
from tiny_vqa.text import IMAGE, Asked, Question, Vocabulary

__all__ = [
    "KINDS",
    "LAYERS",
    "MEMORY",
    "TOKENS",
    "VISION_DIM",
    "WIDTH",
    "Images",
    "about_every",
    "ask",
    "batches",
    "lesson",
    "load",
    "one_each",
    "vocabulary",
]

PATCH = 4
"""Width of a patch; patches overlap, one starts at every pixel."""
GRID = 8 - PATCH + 1
"""Patches along each side of an image."""
TOKENS, VISION_DIM = GRID**2, PATCH**2
WIDTH, LAYERS = 128, 4
"""Of the language model."""
MEMORY = MemVPConfig(
    vision_dim=VISION_DIM,
    projector_dim=64,
    num_slots=TOKENS + 7,
    feature_scale=1.0,  # the paper's 0.01 and 0.1 suit LLaMA-7B's CLIP features and a hidden size of 4,096
    memory_scale=1.0,
    dropout=0.0,
    shared_positions=False,
)

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip


class Images(NamedTuple):
    """One side of the split.

    Attributes:
        pixels: (n, 8, 8), 0 to 1.
        features: (n, GRID², PATCH²), the patches row by row, standardised.
        digits: what each image shows.
    """

    pixels: Tensor
    features: Tensor
    digits: list[int]

    def __len__(self) -> int:
        return len(self.digits)


def load(*, held_out: int = 360, seed: int = 0) -> tuple[Images, Images]:
    """The images to learn from and those to be asked about, which no training step sees.

    Args:
        held_out: how many of the 1,797 are held out.
        seed: of the shuffle before the split.
    """
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32) / 16
    features = pixels.unfold(1, PATCH, 1).unfold(2, PATCH, 1).reshape(len(pixels), GRID**2, PATCH**2)
    features = (features - pixels.mean()) / pixels.std()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    digits = torch.tensor(data.target)
    parts = [Images(pixels[i], features[i], digits[i].tolist()) for i in (order[held_out:], order[:held_out])]
    return parts[0], parts[1]


class Kind(NamedTuple):
    """A kind of question: how it is put, the numbers it may speak of, and the answer for a digit and such a number."""

    phrasings: tuple[str, ...]
    operands: tuple[int, ...]
    answer: Callable[[int, int], str]


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


KINDS = {
    "which": Kind(("what digit is this ?", "which number do you see ?"), (0,), lambda d, _: NUMBERS[d]),
    "plus": Kind(("what is it plus {} ?", "add {} to it ."), (1, 2, 3, 4, 5), lambda d, n: NUMBERS[d + n]),
    "twice": Kind(("what is twice this number ?", "double it ."), (0,), lambda d, _: NUMBERS[2 * d]),
    "to ten": Kind(("how much is it less than ten ?",), (0,), lambda d, _: NUMBERS[10 - d]),
    "even": Kind(("is it even ?", "can it be halved ?"), (0,), lambda d, _: _yes(d % 2 == 0)),
    "more": Kind(("is it more than {} ?",), tuple(range(1, 9)), lambda d, n: _yes(d > n)),
}
_OFTEN = ["plus", "plus", *KINDS]  # in training: adding has five times as much to learn as the others


def vocabulary() -> Vocabulary:
    """Every word of a question, a description or an answer."""
    phrases = [phrase.replace("{}", "") for kind in KINDS.values() for phrase in kind.phrasings]
    words = {word for phrase in phrases for word in phrase.split()}
    letters = {letter for number in NUMBERS[:10] for letter in number}
    return Vocabulary(words | letters | {*NUMBERS, "yes", "no", "this", "is", ".", "answer"})


def ask(rng: random.Random, digit: int, shown: str = IMAGE, kind: str | None = None) -> Question:
    """A question about ``digit``.

    Args:
        rng: chooses the phrasing, the operand and, where it is None, the kind.
        digit: what the answer is computed from.
        shown: what stands for the digit in the prompt: its name spelled out, or an image.
        kind: a key of :data:`KINDS`.
    """
    kind = kind or rng.choice(_OFTEN)
    operand = rng.choice(KINDS[kind].operands)
    phrase = rng.choice(KINDS[kind].phrasings).format(NUMBERS[operand])
    return Question(kind, f"this is {shown} . {phrase} answer", KINDS[kind].answer(digit, operand))


def lesson(rng: random.Random, rows: int = 64) -> list[Question]:
    """Questions about digits that the text spells out: ``this is s e v e n . add three to it . answer ten``."""
    digits = [rng.randrange(10) for _ in range(rows)]
    return [ask(rng, digit, " ".join(NUMBERS[digit])) for digit in digits]


def batches(images: Images, *, rows: int = 32, seed: int = 1) -> Iterator[Asked]:
    """Training batches without end."""
    picks, step = random.Random(seed), 0
    while True:
        step += 1
        chosen, rng = picks.choices(range(len(images)), k=rows), random.Random(f"{seed} {step}")
        yield Asked([ask(rng, images.digits[row]) for row in chosen], chosen)


def one_each(images: Images, *, seed: int = 1) -> Asked:
    """One question per image, the kinds in turn."""
    rng, kinds = random.Random(seed), list(KINDS)
    questions = [ask(rng, digit, IMAGE, kinds[row % len(kinds)]) for row, digit in enumerate(images.digits)]
    return Asked(questions, list(range(len(images))))


def about_every(images: Images, *, seed: int = 2) -> Asked:
    """Every kind of question about every image."""
    rng = random.Random(seed)
    pairs = [(row, kind) for row in range(len(images)) for kind in KINDS]
    questions = [ask(rng, images.digits[row], IMAGE, kind) for row, kind in pairs]
    return Asked(questions, [row for row, _ in pairs])
