"""The same number of steps for each method, on the same images and questions; the methods take turns step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tiny_vqa.methods import Method
from tiny_vqa.text import Asked, Vocabulary, batch

__all__ = ["Run", "reply", "share_right", "train"]

_ROWS_AT_ONCE = 360


@dataclass
class Run:
    """How a method's training went.

    Attributes:
        name: of the method.
        losses: per step.
        seconds: per step, from the forward to the optimizer's end.
        curve: (step, accuracy on held-out images) as training went on.
        tokens: of text (words, no padding, no visual tokens) that all steps saw.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0

    @property
    def step_time(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Text tokens that a second of median steps sees."""
        return self.tokens / len(self.seconds) / self.step_time


class _Trainer:
    """One method with its optimizer: AdamW as in the paper, a short warm-up and a cosine."""

    def __init__(self, method: Method, steps: int, learning_rate: float) -> None:
        self.method, self.run, self.parameters = method, Run(method.name), method.trained()
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1
        )

    def step(self, vocabulary: Vocabulary, features: Tensor, asked: Asked) -> None:
        """One step."""
        tokens = batch(vocabulary, asked.questions, places=self.method.places)
        shown = features[asked.rows]
        start = time.perf_counter()
        loss = self.method.loss(shown, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.run.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.run.losses.append(loss.item())
        self.run.tokens += sum(len(q.prompt.split()) + 2 for q in asked.questions)

    def look(self, vocabulary: Vocabulary, features: Tensor, asked: Asked, step: int) -> None:
        """Accuracy on held-out images."""
        self.run.curve.append((step, share_right(asked, reply(self.method, vocabulary, features, asked))))


def train(
    methods: Sequence[Method],
    vocabulary: Vocabulary,
    features: Tensor,
    batches: Iterator[Asked],
    *,
    steps: int,
    learning_rates: Sequence[float],
    held_out: tuple[Tensor, Asked],
    looks: int = 10,
) -> list[Run]:
    """Train every method, all of them slowed alike by whatever else the machine does.

    Args:
        methods: what to train.
        vocabulary: of the language model.
        features: (n, tokens, vision_dim), the images to learn from.
        batches: what is asked about them, step by step.
        steps: for each.
        learning_rates: the highest of each method.
        held_out: features and questions, to look how far they are.
        looks: how often to look.
    """
    trainers = [_Trainer(method, steps, rate) for method, rate in zip(methods, learning_rates, strict=True)]
    bar = tqdm(range(1, steps + 1), desc="questions about images", unit="step", mininterval=1)
    for step in bar:
        asked = next(batches)
        for trainer in trainers:
            trainer.step(vocabulary, features, asked)
        if step % max(1, steps // looks) == 0:
            for trainer in trainers:
                trainer.look(vocabulary, *held_out, step)
            bar.set_postfix({t.run.name: f"{t.run.curve[-1][1]:.1%}" for t in trainers}, refresh=False)
    return [trainer.run for trainer in trainers]


def reply(method: Method, vocabulary: Vocabulary, features: Tensor, asked: Asked, *, blind: bool = False) -> list[str]:
    """The method's generated answers in words; blind: with the images withheld."""
    answers: list[str] = []
    for start in range(0, len(asked.rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        prompts = batch(vocabulary, asked.questions[part], answered=False, places=method.places)
        shown = None if blind else features[asked.rows[part]]
        answers += [vocabulary.decode(ids) for ids in method.answer(shown, prompts).tolist()]
    return answers


def share_right(asked: Asked, answers: Sequence[str]) -> float:
    """Of all answers."""
    return sum(answer == q.answer for q, answer in zip(asked.questions, answers, strict=True)) / len(answers)
