"""What came of it: a table on the terminal, curves and a page of images with answers as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from digit_questions.images import Images
from digit_questions.questions import KINDS, Question
from digit_questions.race import Run

__all__ = ["Score", "aligned", "draw_answers", "draw_curves", "score"]

Score = Mapping[str, float]

_COLOURS = ("#c44e52", "#4c72b0")
_SMOOTHED = 50  # steps, in the drawn loss


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Share of right answers per kind of question, and over all of them under "all"."""
    right = [answer == question.answer for question, answer in zip(questions, answers, strict=True)]
    shares = {"all": sum(right) / len(right)}
    for kind in KINDS:
        of_kind = [ok for ok, question in zip(right, questions, strict=True) if question.kind == kind]
        shares[kind] = sum(of_kind) / len(of_kind)
    return shares


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right, a rule under the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss over steps, accuracy on held-out images over steps and over the training time that it took."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, steps, seconds = figure.subplots(1, 3)
    for run, colour in zip(runs, _COLOURS, strict=True):
        smooth = [sum(run.losses[max(0, i - _SMOOTHED) : i]) / min(i, _SMOOTHED) for i in range(1, len(run.losses) + 1)]
        loss.plot(range(1, len(smooth) + 1), smooth, color=colour, label=run.name)
        at, accuracy = zip(*run.curve, strict=True)
        steps.plot(at, [100 * share for share in accuracy], color=colour, marker="o", markersize=3, label=run.name)
        seconds.plot(
            [step * run.step_time for step in at],
            [100 * share for share in accuracy],
            color=colour,
            marker="o",
            markersize=3,
            label=run.name,
        )
    loss.set(xlabel="step", ylabel="loss of the answers", yscale="log")
    steps.set(xlabel="step", ylabel="right answers, held-out images (%)", ylim=(0, 100))
    seconds.set(xlabel="seconds of training steps", ylabel="right answers, held-out images (%)", ylim=(0, 100))
    for panel in (loss, steps, seconds):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    loss.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_answers(
    images: Images,
    questions: Sequence[Question],
    answers: Sequence[str],
    rows: Sequence[int],
    path: Path,
    *,
    columns: int = 6,
    count: int = 18,
) -> None:
    """Held-out images, each with a question about it and MemVP's answer: green when right, red with the right one beside."""
    kinds = list(KINDS)
    figure = Figure(figsize=(2.0 * columns, 2.45 * (count // columns)), layout=ConstrainedLayoutEngine(h_pad=0.08))
    for place, panel in enumerate(figure.subplots(count // columns, columns).flat):
        number = place * len(kinds) + place % len(kinds)  # image `place`, one kind after the other
        question, answer = questions[number], answers[number]
        right = answer == question.answer
        panel.imshow(images.pixels[rows[number]].numpy(), cmap="gray_r")
        panel.set_xticks([])
        panel.set_yticks([])
        text = question.prompt.split(" . ", 1)[1].removesuffix(" answer").replace(" ?", "?").removesuffix(" .")
        panel.set_title(text, fontsize=8)
        panel.set_xlabel(
            answer if right else f"{answer or '—'}  (it is {question.answer})",
            fontsize=11,
            color="#2e7d32" if right else "#c62828",
            fontweight="bold",
        )
    figure.savefig(path, dpi=90)
