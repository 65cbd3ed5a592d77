"""Committed result files, and what a reader asks of them: the headline, the paper's ratios, where we lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.commit import DIRTY, UNKNOWN_COMMIT
from harness.results import BASELINES, load

__all__ = ["FEWEST_SAMPLES", "OURS", "PAPER", "Machine", "fastest", "headline", "losses", "machines", "ours"]

FEWEST_SAMPLES = 20

#: What a user runs, in this order where a case has several.
OURS = ("MemVPModel", "factored-auto", "factored-torch", "text-auto", "text-torch")

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
        documents: by program ("latency", "training", "training-checkpointing", "kernels", …).
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

    @property
    def is_dirty(self) -> bool:
        """Whether a file was measured with changes that no commit has."""
        return any(document["environment"]["commit"].endswith(DIRTY) for document in self.documents.values())

    def rows(self, *programs: str) -> list[_Row]:
        """The rows of these programs, with whatever switches ("training" has the rows of "training-checkpointing"); [] where not run."""
        return [
            row
            for program, document in self.documents.items()
            if program.split("-")[0] in programs
            for row in document["rows"]
        ]


def machines(results: Path) -> list[Machine]:
    """All machines with result files, GPUs first.

    Raises:
        ValueError: a file fails the schema, or has rows that no report may quote.
    """
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
        documents = {path.stem: _quotable(load(path), path) for path in paths}
        if documents:
            found.append(Machine(folder, documents))
    return sorted(found, key=lambda machine: (not machine.is_gpu, machine.folder.name))


def _quotable(document: dict[str, Any], path: Path) -> dict[str, Any]:
    environment = document["environment"]
    if environment["commit"] == UNKNOWN_COMMIT:
        raise ValueError(
            f"{path}: measured outside a checkout; set MEMVP_COMMIT to the commit, or pass --commit to gpu_report.py, and measure again"
        )
    if environment.get("triton_interpreted"):
        raise ValueError(
            f"{path}: measured under Triton's interpreter, whose speed says nothing; unset TRITON_INTERPRET"
        )
    few = [row for row in document["rows"] if row["status"] == "ok" and row["samples"] < FEWEST_SAMPLES]
    if few:
        raise ValueError(f"{path}: {len(few)} rows have fewer than {FEWEST_SAMPLES} samples; measure without --quick")
    return document


def ours(rows: Iterable[_Row]) -> _Row | None:
    """The row of what a user runs: of a model MemVPModel, of an FFN fused_ffn with the backend that "auto" takes (on a CPU "torch")."""
    by_name = {row["variant"]: row for row in rows if row["status"] == "ok"}
    return next((by_name[name] for name in OURS if name in by_name), None)


def over(row: _Row, mine: _Row) -> float:
    """A row's time over ours, as the two were timed together: a machine drifts between one turn of variants and the next."""
    return float(row["median_ms"] / (row.get("beside_ms") or mine["median_ms"]))


def fastest(rows: Iterable[_Row], mine: _Row, *variants: str) -> _Row | None:
    """Of these variants the timed row that is fastest beside ours."""
    found = [row for row in rows if row["status"] == "ok" and row["variant"] in variants]
    return min(found, key=lambda row: over(row, mine), default=None)


def by_case(rows: Iterable[_Row]) -> dict[str, list[_Row]]:
    """Rows of each case, in the order measured."""
    cases: dict[str, list[_Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def headline(machine: Machine) -> list[dict[str, Any]]:
    """One line per case of the whole model: prompt-length, text only and the official form, each eager or compiled, whichever is
    faster; ours; what the ratio is."""
    lines = []
    for case, rows in by_case(machine.rows("latency", "training")).items():
        mine = ours(rows)
        prompt = None if mine is None else fastest(rows, mine, *BASELINES["prompt"])
        if mine is None or mine["level"] != "model" or prompt is None:
            continue
        text = fastest(rows, mine, *BASELINES["text"])
        official = fastest(rows, mine, "official-eager", "official-compile")
        lines.append(
            {
                "case": case,
                "prompt_ms": prompt["median_ms"],
                "ours_ms": prompt.get("beside_ms") or mine["median_ms"],
                "text_ms": text and text["median_ms"],
                "official_ms": official and official["median_ms"],
                "speedup_vs_prompt": over(prompt, mine),
            }
        )
    return lines


def paper_beside_ours(machine: Machine) -> list[dict[str, Any]]:
    """The paper's ratios and this machine's for the closest cases: 256 visual tokens, any text length and batch measured."""
    lines: list[dict[str, Any]] = []
    for kind, what, ratio in PAPER:
        program = "training" if kind == "training" else "latency"
        phases = {"training": ("training",), "inference": ("prefill", "decode"), "prefill": ("prefill",)}[kind]
        for case, rows in by_case(machine.rows(program)).items():
            mine = ours(rows)
            if mine is None or mine["level"] != "model" or mine["phase"] not in phases or mine["visual_tokens"] != 256:
                continue
            prompt, text = (fastest(rows, mine, *BASELINES[name]) for name in ("prompt", "text"))
            here = None if prompt is None else over(prompt, mine)
            if kind == "prefill" and here is not None:
                here = None if text is None else here / over(text, mine)
            lines.append({"paper": what, "ratio": f"{ratio:.2f}×", "case": case, "here": here})
    return lines


def losses(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Cases in which ours is slower than the prompt-length form, or than the best other form of the same memory."""
    found = []
    for case, group in by_case(rows).items():
        mine = ours(group)
        if mine is None or mine["variant"].startswith("text"):
            continue

        def ratio(row: _Row, mine: _Row = mine) -> float:
            return 1 / over(row, mine)

        others = [
            row
            for row in group
            if row["status"] == "ok"
            and row["variant"] not in (*BASELINES["text"], *BASELINES["matmul"])
            and not _is_ours(row["variant"])
        ]
        best = max(others, key=ratio, default=None)
        if best is not None and ratio(best) > 1:
            found.append(
                {
                    "case": case,
                    "ours_ms": mine["median_ms"],
                    "faster": best["variant"],
                    "faster_ms": best["median_ms"],
                    "ratio": ratio(best),
                }
            )
    return found


def _is_ours(variant: str) -> bool:
    ours = variant == "MemVPModel" or variant.split("-")[0] in ("plain", "factored", "positions")
    return ours and not variant.endswith(("-eager", "-compile", "-joined"))
