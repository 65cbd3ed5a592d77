"""Problems to tensors: padded on the right to train, on the left to be continued."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedTokenizerBase

from science_questions.data import Problem, read_image
from science_questions.prompts import Tokens, pad_token, question_tokens, training_tokens

__all__ = ["Reader", "question_batches", "training_batches"]


class Reader(NamedTuple):
    """What turns a problem into a row.

    Attributes:
        tokenizer: of the language model.
        limit: most tokens of a row (the paper: 512).
        image_size: width and height of the vision model's input.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    image_size: int


class _Rows(Dataset):  # type: ignore[type-arg]
    """Tokens and pixels of each problem, read when asked for."""

    def __init__(self, reader: Reader, problems: Sequence[Problem]) -> None:
        self.reader, self.problems = reader, problems

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, row: int) -> tuple[Tokens, Tensor | None]:
        problem = self.problems[row]
        return training_tokens(self.reader.tokenizer, problem, self.reader.limit), _pixels(self.reader, problem)


def training_batches(
    reader: Reader, problems: Sequence[Problem], *, rows: int, rank: int, world: int, workers: int, seed: int
) -> tuple[DataLoader[Any], DistributedSampler[Any]]:
    """This process's share of an epoch; call the sampler's ``set_epoch`` before each.

    A batch has input_ids, attention_mask, labels (-100 but on the answer) and pixel_values, one entry per row, None where a
    problem has no image.
    """
    data = _Rows(reader, problems)
    collate = functools.partial(_collate, pad=pad_token(reader.tokenizer))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=True, seed=seed)

    loader = DataLoader(
        data, batch_size=rows, sampler=sampler, collate_fn=collate, num_workers=workers, drop_last=len(sampler) >= rows
    )
    return loader, sampler


def _collate(items: list[tuple[Tokens, Tensor | None]], *, pad: int) -> dict[str, Any]:
    length = max(len(tokens.ids) for tokens, _ in items)
    ids = torch.full((len(items), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, _) in enumerate(items):
        end = len(tokens.ids)
        ids[row, :end] = torch.tensor(tokens.ids)
        mask[row, :end] = 1
        labels[row, tokens.prompt : end] = ids[row, tokens.prompt : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": [p for _, p in items]}


def question_batches(
    reader: Reader, problems: Sequence[Problem], *, rows: int
) -> Iterator[tuple[Sequence[Problem], dict[str, Any]]]:
    """Problems in turn, with the prompt that ends in ``The answer is``."""
    pad = pad_token(reader.tokenizer)
    for start in range(0, len(problems), rows):
        part = problems[start : start + rows]
        prompts = [question_tokens(reader.tokenizer, problem, reader.limit) for problem in part]
        length = max(map(len, prompts))
        ids = torch.full((len(part), length), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        pixels = [_pixels(reader, problem) for problem in part]
        yield part, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def _pixels(reader: Reader, problem: Problem) -> Tensor | None:
    return None if problem.image is None else read_image(problem.image, reader.image_size)
