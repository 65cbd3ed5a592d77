"""Committed result files, and what a reader asks of them: the headline, the paper's ratios, where we lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.environment import UNKNOWN_COMMIT
from harness.results import load

__all__ = ["FEWEST_SAMPLES", "PAPER", "Machine", "headline", "losses", "machines", "ours"]

FEWEST_SAMPLES = 20

_Row = Mapping[str, Any]

#: The paper's own figures for LLaMA-7B (arXiv 2405.05615; seconds per batch as tabled by arXiv 2410.17779): text, what, ratio.
PAPER = (
    ("training", "training step, LLaVA-LoRA over MemVP (0.49 s over 0.28 s a batch)", 0.49 / 0.28),
    ("inference", "inference, LLaVA-LoRA over MemVP (3.42 s over 1.88 s a batch)", 3.42 / 1.88),
    ("prefill", "256 visual tokens in front of 64 of text, over text alone", 4.8),
)


@dataclass(frozen=True)
class Machine:
    """The result files of one machine.

    Attributes:
        folder: results/<machine>.
        documents: by program ("latency", "training", "kernels", "decode").
    """

    folder: Path
    documents: Mapping[str, Mapping[str, Any]]

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the first program; the report names each program's own commit and date."""
        return next(iter(self.documents.values()))["environment"]

    @property
    def is_gpu(self) -> bool:
        return bool(self.environment["device_type"] == "cuda")

    def rows(self, program: str) -> list[_Row]:
        """A program's rows, [] where it was not run."""
        return list(self.documents[program]["rows"]) if program in self.documents else []


def machines(results: Path) -> list[Machine]:
    """All machines with result files, GPUs first.

    Raises:
        ValueError: a file fails the schema, or has rows that no report may quote.
    """
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        documents = {path.stem: _quotable(load(path), path) for path in sorted(folder.glob("*.json"))}
        if documents:
            found.append(Machine(folder, documents))
    return sorted(found, key=lambda machine: (not machine.is_gpu, machine.folder.name))


def _quotable(document: dict[str, Any], path: Path) -> dict[str, Any]:
    environment = document["environment"]
    if environment["commit"] == UNKNOWN_COMMIT:
        raise ValueError(f"{path}: measured outside a checkout; set MEMVP_COMMIT to the commit and measure again")
    if environment.get("triton_interpreted"):
        raise ValueError(
            f"{path}: measured under Triton's interpreter, whose speed says nothing; unset TRITON_INTERPRET"
        )
    few = [row for row in document["rows"] if row["status"] == "ok" and row["samples"] < FEWEST_SAMPLES]
    if few:
        raise ValueError(f"{path}: {len(few)} rows have fewer than {FEWEST_SAMPLES} samples; measure without --quick")
    return document


def ours(rows: Iterable[_Row]) -> _Row | None:
    """The row of what MemVPModel runs: the factored memory with the backend that "auto" takes (on a CPU that is "torch")."""
    by_name = {row["variant"]: row for row in rows if row["status"] == "ok"}
    return by_name.get("factored-auto") or by_name.get("factored-torch")


def by_case(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    """Rows of each case, in the order measured."""
    cases: dict[str, list[_Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def headline(machine: Machine) -> list[dict[str, Any]]:
    """One line per case of the whole model: prompt-length, text only, ours, and what the ratio is."""
    lines = []
    for program in ("latency", "training"):
        for case, rows in by_case(machine.rows(program)).items():
            mine = ours(rows)
            medians = {row["variant"]: row["median_ms"] for row in rows if row["status"] == "ok"}
            if mine is None or mine["level"] != "model" or "prompt" not in medians:
                continue
            lines.append(
                {
                    "case": case,
                    "prompt_ms": medians["prompt"],
                    "ours_ms": mine["median_ms"],
                    "text_ms": medians.get("text"),
                    "official_ms": medians.get("official-eager"),
                    "speedup_vs_prompt": mine["speedup_vs_prompt"],
                }
            )
    return lines


def paper_beside_ours(machine: Machine) -> list[dict[str, Any]]:
    """The paper's ratios and this machine's for the closest cases: 256 visual tokens, any text length and batch measured."""
    lines: list[dict[str, Any]] = []
    for kind, text, ratio in PAPER:
        program = "training" if kind == "training" else "latency"
        phases = {"training": ("training",), "inference": ("prefill", "decode"), "prefill": ("prefill",)}[kind]
        for case, rows in by_case(machine.rows(program)).items():
            mine = ours(rows)
            if mine is None or mine["level"] != "model" or mine["phase"] not in phases or mine["visual_tokens"] != 256:
                continue
            medians = {row["variant"]: row["median_ms"] for row in rows if row["status"] == "ok"}
            if kind == "prefill":
                here = medians["prompt"] / medians["text"] if {"prompt", "text"} <= set(medians) else None
            else:
                here = mine["speedup_vs_prompt"]
            lines.append({"paper": text, "ratio": f"{ratio:.2f}×", "case": case, "here": here})
    return lines


def losses(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Cases in which ours is slower than the prompt-length form, or than the best other form of the same memory."""
    found = []
    for case, group in by_case(rows).items():
        mine = ours(group)
        if mine is None:
            continue
        others = [
            row
            for row in group
            if row["status"] == "ok"
            and row["variant"] not in ("text", "matmul", "text-compile")
            and not _is_ours(row["variant"])
        ]
        best = min(others, key=lambda row: row["median_ms"], default=None)
        if best is not None and best["median_ms"] < mine["median_ms"]:
            found.append(
                {
                    "case": case,
                    "ours_ms": mine["median_ms"],
                    "faster": best["variant"],
                    "faster_ms": best["median_ms"],
                    "ratio": mine["median_ms"] / best["median_ms"],
                }
            )
    return found


def _is_ours(variant: str) -> bool:
    return variant.split("-")[0] in ("plain", "factored", "positions") and not variant.endswith("-eager")
