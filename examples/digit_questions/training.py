"""The same number of steps for each method, on the same images and questions; the methods take turns step by step."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from digit_questions.images import Images
from digit_questions.methods import Method
from digit_questions.questions import KINDS, Question, Vocabulary, ask, batch

__all__ = ["Run", "held_out_questions", "reply", "train"]

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

    def step(self, vocabulary: Vocabulary, images: Images, rows: Sequence[int], rng: random.Random) -> None:
        """One step on questions about the given images."""
        shown = self.method.shown
        questions = [ask(rng, images.digits[row], shown) for row in rows]
        tokens, features = batch(vocabulary, questions), images.features[list(rows)]
        start = time.perf_counter()
        loss = self.method.loss(features, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.run.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.run.losses.append(loss.item())
        self.run.tokens += sum(len(q.prompt.split()) - shown.count(" ") + 2 for q in questions)

    def look(self, vocabulary: Vocabulary, images: Images, step: int, seed: int) -> None:
        """Accuracy on one question per held-out image."""
        rng, kinds = random.Random(seed), list(KINDS)
        asked = [ask(rng, d, self.method.shown, kinds[row % len(kinds)]) for row, d in enumerate(images.digits)]
        answers = reply(self.method, vocabulary, images, asked, range(len(images)))
        right = sum(answer == question.answer for answer, question in zip(answers, asked, strict=True))
        self.run.curve.append((step, right / len(asked)))


def train(
    methods: Sequence[Method],
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
    """Train every method, all of them slowed alike by whatever else the machine does.

    Args:
        methods: what to train.
        vocabulary: of the language model.
        images: to learn from.
        held_out: to look how far they are, with one question per image.
        steps: for each.
        rows: questions per step.
        learning_rate: the highest.
        looks: how often to look.
        seed: of images, questions and phrasings.
    """
    trainers = [_Trainer(method, steps, learning_rate) for method in methods]
    picks = random.Random(seed)
    bar = tqdm(range(1, steps + 1), desc="questions about images", unit="step", mininterval=1)
    for step in bar:
        chosen = picks.choices(range(len(images)), k=rows)
        for trainer in trainers:
            trainer.step(vocabulary, images, chosen, random.Random(f"{seed} {step}"))
        if step % max(1, steps // looks) == 0:
            for trainer in trainers:
                trainer.look(vocabulary, held_out, step, seed)
            bar.set_postfix({t.run.name: f"{t.run.curve[-1][1]:.1%}" for t in trainers}, refresh=False)
    return [trainer.run for trainer in trainers]


def held_out_questions(images: Images, shown: str, *, seed: int = 2) -> tuple[list[Question], list[int]]:
    """Every kind of question about every image, and the image each is about; the same for every method."""
    rng = random.Random(seed)
    pairs = [(row, kind) for row in range(len(images)) for kind in KINDS]
    return [ask(rng, images.digits[row], shown, kind) for row, kind in pairs], [row for row, _ in pairs]


def reply(
    method: Method,
    vocabulary: Vocabulary,
    images: Images,
    questions: Sequence[Question],
    rows: Sequence[int],
    *,
    blind: bool = False,
) -> list[str]:
    """The method's generated answers in words, to questions about the images of the given rows; blind: without them."""
    answers: list[str] = []
    for start in range(0, len(questions), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        prompts = batch(vocabulary, questions[part], answered=False)
        features = None if blind else images.features[list(rows[part])]
        answers += [vocabulary.decode(ids) for ids in method.answer(features, prompts).tolist()]
    return answers
