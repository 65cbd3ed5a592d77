"""Questions as words, and as the padded batches that a language model takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IMAGE", "Asked", "Batch", "Question", "Vocabulary", "batch"]

PAD, END, IMAGE = "<pad>", "<end>", "<image>"


class Question(NamedTuple):
    """One question with its answer; ``prompt`` starts with a description in words, or with :data:`IMAGE`."""

    kind: str
    prompt: str
    answer: str


class Asked(NamedTuple):
    """Questions, and for each the row of the image that it is about."""

    questions: list[Question]
    rows: list[int]


class Batch(NamedTuple):
    """Padded questions: (B, T) each; labels are -100 but on the answer and the end token."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Vocabulary:
    """Words, and single letters for what is spelled out.

    Attributes:
        words: token id → word.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [PAD, END, IMAGE, *sorted(set(words))]
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


def batch(vocabulary: Vocabulary, questions: Sequence[Question], *, answered: bool = True, places: int = 1) -> Batch:
    """Questions with their answers, padded on the right to train; or without, padded on the left to be answered.

    Args:
        vocabulary: of the language model.
        questions: at least one.
        answered: with answers.
        places: how many tokens stand for the image.
    """
    shown = " ".join([IMAGE] * places)
    prompts = [vocabulary.encode(question.prompt.replace(IMAGE, shown)) for question in questions]
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
