"""What a run reached, as a file: the table of examples/README.md is made from the committed one, `examples/results/digits.json`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from digit_questions.contestants import Contestant
from digit_questions.race import Run
from digit_questions.report import Score

__all__ = ["make", "readme_table", "write"]

_CHECKOUT = Path(__file__).resolve().parents[2]


def make(
    contestants: Sequence[Contestant], runs: Sequence[Run], scores: Sequence[Score], blind: Score, *, seconds: float
) -> dict[str, Any]:
    """The figures of one run, with the machine, the versions and the commit.

    Args:
        scores: per contestant; blind: MemVP's with the image withheld.
        seconds: of the whole program.
    """
    rows = [
        {
            "name": run.name,
            "steps": len(run.seconds),
            "right": score,
            "ms_per_step": 1e3 * run.step_time,
            "text_tokens_per_second": run.tokens_per_second,
            "trainable": sum(p.numel() for p in contestant.trained()),
        }
        for contestant, run, score in zip(contestants, runs, scores, strict=True)
    ]
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "seconds": seconds,
        "rows": [*rows, {"name": "MemVP, image withheld", "right": blind}],
    }


def write(record: Mapping[str, Any], path: Path) -> None:
    """As indented JSON."""
    path.write_text(json.dumps(record, indent=2) + "\n")


def readme_table(record: Mapping[str, Any]) -> str:
    """The table and its source in Markdown."""
    lines = [
        f"{record['machine']}, {record['threads']} threads, torch {record['torch']}, transformers {record['transformers']}, "
        f"commit `{record['commit']}`; {record['seconds'] / 60:.0f} minutes in all:",
        "",
        "| | right answers | ms per step | text tokens/s | trainable |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        right = f"{100 * row['right']['all']:.1f} %"
        if "ms_per_step" in row:
            speed = f"{row['ms_per_step']:.1f} | {row['text_tokens_per_second']:,.0f} | {row['trainable']:,}"
        else:
            speed = " | | "
        lines.append(f"| {row['name']} | {right} | {speed} |")
    return "\n".join(lines)


def _processor() -> str:
    """The processor's name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _commit() -> str:
    """The checked-out commit, "-dirty" where a tracked file differs from it."""
    described = subprocess.run(
        ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unknown"
