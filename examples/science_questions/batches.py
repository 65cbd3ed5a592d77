"""Problems to tensors: padded on the right to train, on the left to be continued."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from science_questions.data import Problem, read_image
from science_questions.prompts import Tokens, pad_token, question_tokens, training_tokens

__all__ = ["Reader", "TrainingRows", "question_batches"]

Row = tuple[Tokens, "Tensor | None"]


class Reader(NamedTuple):
    """What turns problems into tensors.

    Attributes:
        tokenizer: of the language model.
        limit: most tokens of a row (the paper: 512).
        image_size: width and height of the vision model's input.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    image_size: int

    def pixels(self, problem: Problem) -> Tensor | None:
        """Of its image, if it has one."""
        return None if problem.image is None else read_image(problem.image, self.image_size)

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """input_ids, attention_mask, labels (-100 but on the answer), and pixel_values: an entry per row, None without an image."""
        length = max(len(tokens.ids) for tokens, _ in rows)
        ids = torch.full((len(rows), length), pad_token(self.tokenizer))
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, _) in enumerate(rows):
            end = len(tokens.ids)
            ids[row, :end] = torch.tensor(tokens.ids)
            mask[row, :end] = 1
            labels[row, tokens.prompt : end] = ids[row, tokens.prompt : end]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": [p for _, p in rows]}


class TrainingRows(Dataset):  # type: ignore[type-arg]
    """Tokens and pixels of each problem, read when asked for."""

    def __init__(self, reader: Reader, problems: Sequence[Problem]) -> None:
        self.reader, self.problems = reader, problems

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, row: int) -> Row:
        problem = self.problems[row]
        return training_tokens(self.reader.tokenizer, problem, self.reader.limit), self.reader.pixels(problem)


def question_batches(
    reader: Reader, problems: Sequence[Problem], *, rows: int
) -> Iterator[tuple[Sequence[Problem], dict[str, Any]]]:
    """Problems in turn, with the prompt that ends in ``The answer is``."""
    pad = pad_token(reader.tokenizer)
    for start in range(0, len(problems), rows):
        part = problems[start : start + rows]
        prompts = [torch.tensor(question_tokens(reader.tokenizer, problem, reader.limit)) for problem in part]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left")
        yield part, {"input_ids": ids, "attention_mask": mask, "pixel_values": [reader.pixels(p) for p in part]}
