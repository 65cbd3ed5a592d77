"""Questions about a digit, their answers, and the words they are made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IMAGE", "KINDS", "Batch", "Question", "Vocabulary", "ask", "batch", "spelled"]

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip
PAD, END, IMAGE = "<pad>", "<end>", "<image>"


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


class Question(NamedTuple):
    """One question with its answer; ``prompt`` starts with what the digit is, or with the place of the image."""

    kind: str
    prompt: str
    answer: str


class Vocabulary:
    """Words, and single letters for numbers that are spelled out.

    Attributes:
        words: token id → word.
    """

    def __init__(self) -> None:
        phrases = [phrase.replace("{}", "") for kind in KINDS.values() for phrase in kind.phrasings]
        words = {word for phrase in phrases for word in phrase.split()}
        letters = {letter for number in NUMBERS[:10] for letter in number}
        self.words = [PAD, END, IMAGE, *sorted(words | letters | {*NUMBERS, "yes", "no", "this", "is", ".", "answer"})]
        self._ids = {word: i for i, word in enumerate(self.words)}
        self.pad, self.end, self.image = (self._ids[word] for word in (PAD, END, IMAGE))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids of words separated by spaces."""
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The words up to the end token."""
        ids = list(ids)
        return " ".join(self.words[i] for i in ids[: ids.index(self.end) if self.end in ids else len(ids)])


def spelled(digit: int) -> str:
    """``s e v e n``."""
    return " ".join(NUMBERS[digit])


def ask(rng: random.Random, digit: int, shown: str, kind: str | None = None) -> Question:
    """A question about ``digit``.

    Args:
        rng: chooses the phrasing, the operand and, where it is None, the kind.
        digit: what the answer is computed from.
        shown: what stands for the digit in the prompt: its name spelled out, or places for an image.
        kind: a key of :data:`KINDS`.
    """
    kind = kind or rng.choice(_OFTEN)
    operand = rng.choice(KINDS[kind].operands)
    phrase = rng.choice(KINDS[kind].phrasings).format(NUMBERS[operand])
    return Question(kind, f"this is {shown} . {phrase} answer", KINDS[kind].answer(digit, operand))


class Batch(NamedTuple):
    """Padded questions: (B, T) each; labels are -100 but on the answer and the end token."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def batch(vocabulary: Vocabulary, questions: Sequence[Question], *, answered: bool = True) -> Batch:
    """Questions with their answers, padded on the right to train; or without, padded on the left to be answered."""
    prompts = [vocabulary.encode(question.prompt) for question in questions]
    answers = [[*vocabulary.encode(question.answer), vocabulary.end] * answered for question in questions]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    shape = (len(questions), length)
    ids, mask, labels = torch.full(shape, vocabulary.pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = prompt + answer
        place = slice(0, len(text)) if answered else slice(length - len(text), length)
        ids[row, place] = torch.tensor(text)
        mask[row, place] = 1
        labels[row, len(prompt) : len(text)] = torch.tensor(answer, dtype=torch.long)
    return Batch(ids, mask, labels)
