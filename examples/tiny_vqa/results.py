"""What came of it: scores, a record that names machine and commit, curves, and a page of images with answers."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from tabulate import tabulate
from torch import Tensor

from tiny_vqa.text import IMAGE, Asked
from tiny_vqa.training import Run, share_right

__all__ = ["Score", "by_kind", "checked_out", "draw_answers", "draw_curves", "markdown", "record", "row", "score"]

Score = Mapping[str, float]

_COLORS = ("#c44e52", "#4c72b0", "#55a868")
_SMOOTHED = 50  # steps, in the drawn loss


def score(asked: Asked, answers: Sequence[str]) -> dict[str, float]:
    """Share of right answers per kind of question, and over all of them under "all"."""
    shares = {"all": share_right(asked, answers)}
    for kind in dict.fromkeys(question.kind for question in asked.questions):
        own = [(q.answer == answer) for q, answer in zip(asked.questions, answers, strict=True) if q.kind == kind]
        shares[kind] = sum(own) / len(own)
    return shares


def row(name: str, scores: Sequence[Score], runs: Sequence[Run] = (), trained: int | None = None) -> dict[str, Any]:
    """One row of a record.

    Args:
        name: what was asked.
        scores: one per seed; the row holds their mean, and each where there are several.
        runs: the trainings behind them, if any.
        trained: how many parameters train.
    """
    found: dict[str, Any] = {
        "name": name,
        "right": {kind: statistics.fmean(one[kind] for one in scores) for kind in scores[0]},
    }
    if len(scores) > 1:
        found["seeds"] = [dict(one) for one in scores]
    if runs:
        found |= {
            "steps": len(runs[0].seconds),
            "ms_per_step": 1e3 * statistics.median(second for run in runs for second in run.seconds),
            "text_tokens_per_second": statistics.fmean(run.tokens_per_second for run in runs),
        }
    if trained is not None:
        found["trainable"] = trained
    return found


def record(rows: Sequence[Mapping[str, Any]], *, seconds: float, commit: str) -> dict[str, Any]:
    """The figures of one program run, with the machine, the versions and the commit.

    Args:
        rows: as :func:`row` makes them.
        seconds: of the whole program.
        commit: from :func:`checked_out`, when the program began.
    """
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
        "seconds": seconds,
        "rows": list(rows),
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


def by_kind(found: Mapping[str, Any]) -> str:
    """Right answers by kind of question: the mean, and the lowest and highest where there are several seeds."""
    kinds = list(found["rows"][0]["right"])
    lines = []
    for row in found["rows"]:
        cells = []
        for kind in kinds:
            each = [100 * one[kind] for one in row.get("seeds", ())]
            spread = f" ({min(each):.1f}–{max(each):.1f})" if each else ""
            cells.append(f"{100 * row['right'][kind]:.1f}{spread}")
        lines.append([row["name"], *cells])
    return tabulate(lines, ["right answers, %", *kinds], tablefmt="pipe", disable_numparse=True)


def _processor() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def checked_out() -> str:
    """The checked-out commit, "-dirty" where a tracked file differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def draw_curves(races: Sequence[Sequence[Run]], path: Path) -> None:
    """Loss over steps, accuracy on held-out images over steps and over the training time that it took.

    Args:
        races: the methods' runs, per seed.
        path: of the PNG.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, steps, seconds = figure.subplots(1, 3)
    for number, runs in enumerate(races):
        for run, color in zip(runs, _COLORS, strict=False):
            style = {"color": color, "label": run.name if number == 0 else None, "alpha": 1 if len(races) == 1 else 0.6}
            losses = run.losses
            smooth = [sum(losses[max(0, i - _SMOOTHED) : i]) / min(i, _SMOOTHED) for i in range(1, len(losses) + 1)]
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


def draw_answers(pixels: Tensor, asked: Asked, answers: Sequence[str], chosen: Sequence[int], path: Path) -> None:
    """18 questions with their images and the answers: green when right, red with the right one beside.

    Args:
        pixels: (n, height, width) or (n, height, width, 3), of all images.
        asked: the questions.
        answers: to each.
        chosen: which 18 to show.
        path: of the PNG.
    """
    figure = Figure(figsize=(12, 7.35), layout=ConstrainedLayoutEngine(h_pad=0.08))
    for panel, number in zip(figure.subplots(3, 6).flat, chosen, strict=True):
        question, answer = asked.questions[number], answers[number]
        right = answer == question.answer
        panel.imshow(pixels[asked.rows[number]].numpy(), cmap="gray_r")
        panel.set(xticks=[], yticks=[])
        text = question.prompt.replace(f"this is {IMAGE} .", "").removesuffix(" answer").replace(" ?", "?").strip(" .")
        panel.set_title(text, fontsize=8)
        label = answer if right else f"{answer or '—'}  (it is {question.answer})"
        panel.set_xlabel(label, fontsize=11, color="#2e7d32" if right else "#c62828", fontweight="bold")
    figure.savefig(path, dpi=90)
