"""What came of it: scores, a record that names machine and commit, curves, and a page of images with answers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate

from digit_questions.images import Images
from digit_questions.methods import Method
from digit_questions.questions import KINDS, Question
from digit_questions.training import Run

__all__ = ["Score", "draw_answers", "draw_curves", "markdown", "record", "score"]

Score = Mapping[str, float]

_COLORS = ("#c44e52", "#4c72b0")
_SMOOTHED = 50  # steps, in the drawn loss


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Share of right answers per kind of question, and over all of them under "all"."""
    right = [(q.kind, answer == q.answer) for q, answer in zip(questions, answers, strict=True)]
    shares = {"all": sum(ok for _, ok in right) / len(right)}
    for kind in KINDS:
        of_kind = [ok for asked, ok in right if asked == kind]
        shares[kind] = sum(of_kind) / len(of_kind)
    return shares


def record(
    methods: Sequence[Method], runs: Sequence[Run], scores: Sequence[Score], blind: Score, *, seconds: float
) -> dict[str, Any]:
    """The figures of one program run, with the machine, the versions and the commit.

    Args:
        scores: per method; blind: MemVP's with the image withheld.
        seconds: of the whole program.
    """
    rows = [
        {
            "name": run.name,
            "steps": len(run.seconds),
            "right": right,
            "ms_per_step": 1e3 * run.step_time,
            "text_tokens_per_second": run.tokens_per_second,
            "trainable": sum(p.numel() for p in method.trained()),
        }
        for method, run, right in zip(methods, runs, scores, strict=True)
    ]
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "seconds": seconds,
        "rows": [*rows, {"name": "MemVP, image withheld", "right": blind}],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The record's origin and table, as `examples/README.md` shows the committed one."""
    origin = (
        f"{found['machine']}, {found['threads']} threads, torch {found['torch']}, transformers {found['transformers']}, "
        f"commit `{found['commit']}`; {found['seconds'] / 60:.0f} minutes in all:"
    )
    rows = [
        [
            row["name"],
            f"{100 * row['right']['all']:.1f} %",
            *((f"{row['ms_per_step']:.1f}", f"{row['text_tokens_per_second']:,.0f}", f"{row['trainable']:,}")
              if "trainable" in row else ("", "", "")),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    heads = ["", "right answers", "ms per step", "text tokens/s", "trainable"]
    table = tabulate(rows, heads, tablefmt="pipe", colalign=("left", *["right"] * 4), disable_numparse=True)
    return f"{origin}\n\n{table}"


def _processor() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checked-out commit, "-dirty" where a tracked file differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss over steps, accuracy on held-out images over steps and over the training time that it took."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, steps, seconds = figure.subplots(1, 3)
    for run, color in zip(runs, _COLORS, strict=True):
        style = {"color": color, "label": run.name}
        smooth = [sum(run.losses[max(0, i - _SMOOTHED) : i]) / min(i, _SMOOTHED) for i in range(1, len(run.losses) + 1)]
        loss.plot(range(1, len(smooth) + 1), smooth, **style)
        at, accuracy = zip(*run.curve, strict=True)
        percent = [100 * share for share in accuracy]
        steps.plot(at, percent, marker="o", markersize=3, **style)
        seconds.plot([step * run.step_time for step in at], percent, marker="o", markersize=3, **style)
    right = "right answers, held-out images (%)"
    loss.set(xlabel="step", ylabel="loss of the answers", yscale="log")
    steps.set(xlabel="step", ylabel=right, ylim=(0, 100))
    seconds.set(xlabel="seconds of training steps", ylabel=right, ylim=(0, 100))
    for panel in (loss, steps, seconds):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    loss.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_answers(
    images: Images, questions: Sequence[Question], answers: Sequence[str], rows: Sequence[int], path: Path
) -> None:
    """18 held-out images, each with a question about it and the answer: green when right, red with the right one beside."""
    figure = Figure(figsize=(12, 7.35), layout=ConstrainedLayoutEngine(h_pad=0.08))
    for place, panel in enumerate(figure.subplots(3, 6).flat):
        number = place * len(KINDS) + place % len(KINDS)  # image `place`, one kind after the other
        question, answer = questions[number], answers[number]
        right = answer == question.answer
        panel.imshow(images.pixels[rows[number]].numpy(), cmap="gray_r")
        panel.set(xticks=[], yticks=[])
        text = question.prompt.split(" . ", 1)[1].removesuffix(" answer").replace(" ?", "?").removesuffix(" .")
        panel.set_title(text, fontsize=8)
        label = answer if right else f"{answer or '—'}  (it is {question.answer})"
        panel.set_xlabel(label, fontsize=11, color="#2e7d32" if right else "#c62828", fontweight="bold")
    figure.savefig(path, dpi=90)
