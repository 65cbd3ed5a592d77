"""The same number of steps for each contestant, on the same images and questions, one step each in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from digit_questions.contestants import Contestant
from digit_questions.images import Images
from digit_questions.questions import KINDS, Question, Vocabulary, ask, batch

__all__ = ["Run", "held_out_questions", "race", "reply"]

_ROWS_AT_ONCE = 360


@dataclass
class Run:
    """What a contestant did.

    Attributes:
        name: whose run it is.
        losses: per step.
        seconds: per step, from the forward to the optimiser's end.
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


class _Runner:
    """One contestant with its optimiser: AdamW as in the paper, a short warm-up and a cosine."""

    def __init__(self, contestant: Contestant, steps: int, learning_rate: float) -> None:
        self.contestant = contestant
        self.run = Run(contestant.name)
        self.parameters = contestant.trained()
        self.optimiser = torch.optim.AdamW(self.parameters, betas=(0.9, 0.95), weight_decay=0.02)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=learning_rate, total_steps=steps, pct_start=0.1
        )

    def step(self, vocabulary: Vocabulary, images: Images, rows: Sequence[int], rng: random.Random) -> None:
        """One step on questions about the given images."""
        questions = [ask(rng, images.digits[row], self.contestant.shown) for row in rows]
        tokens, features = batch(vocabulary, questions), images.features[list(rows)]
        start = time.perf_counter()
        loss = self.contestant.loss(features, tokens)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.run.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.run.losses.append(loss.item())
        self.run.tokens += sum(len(q.prompt.split()) - self.contestant.shown.count(" ") + 2 for q in questions)


def race(
    contestants: Sequence[Contestant],
    vocabulary: Vocabulary,
    images: Images,
    held_out: Images,
    *,
    steps: int,
    rows: int = 32,
    learning_rate: float,
    looks: int = 10,
    seed: int = 1,
) -> list[Run]:
    """Train every contestant.

    They take turns step by step, so that whatever else the machine does slows all of them alike.

    Args:
        contestants: who runs.
        vocabulary: of the language model.
        images: to learn from.
        held_out: to look how far they are, with one question per image.
        steps: for each.
        rows: questions per step.
        learning_rate: the highest.
        looks: how often to look.
        seed: of images, questions and phrasings.

    Returns:
        One run per contestant.
    """
    runners = [_Runner(contestant, steps, learning_rate) for contestant in contestants]
    picks = random.Random(seed)
    kinds = list(KINDS)
    bar = tqdm(range(1, steps + 1), desc="questions about images", unit="step", mininterval=1)
    for step in bar:
        chosen = picks.choices(range(len(images)), k=rows)
        for runner in runners:
            runner.step(vocabulary, images, chosen, random.Random(f"{seed} {step}"))
        if step % max(1, steps // looks) == 0:
            for runner in runners:
                rng = random.Random(seed)
                questions = [
                    ask(rng, digit, runner.contestant.shown, kinds[row % len(kinds)])
                    for row, digit in enumerate(held_out.digits)
                ]
                answers = reply(runner.contestant, vocabulary, held_out, questions, range(len(held_out)))
                right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
                runner.run.curve.append((step, right / len(questions)))
            bar.set_postfix({runner.run.name: f"{runner.run.curve[-1][1]:.1%}" for runner in runners}, refresh=False)
    return [runner.run for runner in runners]


def held_out_questions(images: Images, shown: str, *, seed: int = 2) -> tuple[list[Question], list[int]]:
    """Every kind of question about every image, and the image each is about; the same for every contestant."""
    rng = random.Random(seed)
    rows = [row for row in range(len(images)) for _ in KINDS]
    kinds = [kind for _ in range(len(images)) for kind in KINDS]
    return [ask(rng, images.digits[row], shown, kind) for row, kind in zip(rows, kinds, strict=True)], rows


def reply(
    contestant: Contestant,
    vocabulary: Vocabulary,
    images: Images,
    questions: Sequence[Question],
    rows: Sequence[int],
    *,
    blind: bool = False,
) -> list[str]:
    """The contestant's answers in words, generated.

    Args:
        contestant: who answers.
        vocabulary: of the language model.
        images: what the questions are about.
        questions: the questions.
        rows: which image each is about.
        blind: withhold the images.
    """
    answers: list[str] = []
    for start in range(0, len(questions), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        prompts = batch(vocabulary, questions[part], answered=False)
        features = None if blind else images.features[list(rows[part])]
        answers += [vocabulary.decode(ids) for ids in contestant.answer(features, prompts).tolist()]
    return answers
