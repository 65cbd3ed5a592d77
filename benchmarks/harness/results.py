"""Result rows: one per case and variant, with everything that makes the time worth reading; kept as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.schema import problems
from harness.timer import Timing

__all__ = ["Results", "Row", "load", "speedups"]


@dataclass
class Row:
    """One variant of one case. Times are milliseconds per call, sizes bytes; None means that it does not apply.

    Attributes:
        case: what was computed, for people: "ffn prefill 4×64".
        variant: who computed it.
        dtype: of the operands ("bfloat16").
        status: "ok"; "wrong" (the correctness check failed: no speed is given); "skipped" or "failed" with a reason.
        reason: why there is no time.
        error, error_allowed: ‖out − reference‖ / ‖reference‖ against float64 (root mean square over output and gradients where
            both are checked), and twice plain PyTorch's own.
        samples, timing: of the timer.
        first_call_s: seconds that the variant's first call in this case took, before anything else ran it; kernels that another
            case or variant compiled in the same process, or that a cache on disk holds, are not compiled again in it.
        speedup_vs_prompt: time of the prompt-length form of the same case, the faster of eager and torch.compile, over this
            one's; under 1 it loses.
        speedup_vs_text: the same against text only, in which no image takes part.
        speedup_vs_matmul: the same against the bare matrix products.
        beside_ms: median of ours, interleaved with this row, where this row was not timed together with ours' own row.
        level, phase, preset, layers, sequences, text_length, visual_tokens: the case, for programs.
        peak_memory_bytes: operands that this variant keeps, and the most that the call holds besides.
        memory_per_image_bytes, cache_per_image_bytes: kept per image: MemVP's memory, or the KV cache of its prompt tokens.
        flops, bytes, floor_ms, percent_of_floor: of harness.rooflines, and floor over median.
        tflops, gbs: flops and bytes over the median.
        host_us: host time that issuing the call takes; on a CPU, where a call ends when its work does, None.
        sm_clock_mhz, power_w: medians while the case's samples were taken.
        note: what the reader should know.
    """

    case: str
    variant: str
    dtype: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    error_allowed: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    samples: int | None = None
    timing: str | None = None
    first_call_s: float | None = None
    speedup_vs_prompt: float | None = None
    speedup_vs_text: float | None = None
    speedup_vs_matmul: float | None = None
    beside_ms: float | None = None
    level: str | None = None
    phase: str | None = None
    preset: str | None = None
    layers: int | None = None
    sequences: int | None = None
    text_length: int | None = None
    visual_tokens: int | None = None
    peak_memory_bytes: int | None = None
    memory_per_image_bytes: int | None = None
    cache_per_image_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    floor_ms: float | None = None
    percent_of_floor: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    host_us: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    note: str = ""

    def take(self, timing: Timing) -> None:
        """Fills in the times, and the rates that follow from them."""
        self.median_ms, self.p20_ms, self.p80_ms = timing.median_ms, timing.p20_ms, timing.p80_ms
        self.samples, self.timing = len(timing.samples), timing.method
        self.sm_clock_mhz, self.power_w = timing.clocks.get("sm_clock_mhz"), timing.clocks.get("power_w")
        self.note = "; ".join(text for text in (self.note, timing.note) if text)
        if self.floor_ms is not None:
            self.percent_of_floor = 100 * self.floor_ms / timing.median_ms
        if self.flops is not None:
            self.tflops = self.flops / timing.median_ms / 1e9
        if self.bytes is not None:
            self.gbs = self.bytes / timing.median_ms / 1e6

    def judge(self, error: float, allowed: float) -> bool:
        """Records the correctness check. A wrong row says so and never gets a time.

        Returns:
            Whether the variant may be timed.
        """
        right = math.isfinite(error) and error <= allowed
        self.error = error if math.isfinite(error) else None
        self.error_allowed = allowed if math.isfinite(allowed) else None
        if not right:
            self.status = "wrong"
            self.reason = f"error {error:.3g} against float64, allowed {allowed:.3g}"
        return right

    def leave_out(self, status: str, reason: str) -> None:
        """No time, and why: "skipped" for what this machine can't run, "failed" for what broke."""
        self.status, self.reason = status, reason


#: What a speedup is over: the fastest of these variants of the case that was timed.
BASELINES = {"prompt": ("prompt", "prompt-compile"), "text": ("text", "text-compile"), "matmul": ("matmul",)}


def speedups(rows: list[Row]) -> None:
    """Fills in the speedups of every timed row over the baselines of its case, where it has them."""
    medians = {(row.case, row.variant): row.median_ms for row in rows if row.median_ms is not None}
    for row in rows:
        if row.median_ms is None:
            continue
        for baseline, names in BASELINES.items():
            theirs = [medians[row.case, name] for name in names if (row.case, name) in medians]
            setattr(row, f"speedup_vs_{baseline}", min(theirs) / row.median_ms if theirs else None)


class Results:
    """A growing result file; saved after every few rows, so that what was measured survives a run that is cut short.

    Args:
        environment: of harness.environment.
        path: where to keep it; None keeps it in memory.
    """

    def __init__(self, environment: dict[str, Any], path: Path | None = None) -> None:
        self.environment = environment
        self.rows: list[Row] = []
        self._path = path

    @classmethod
    def go_on(cls, environment: dict[str, Any], path: Path) -> Results:
        """The results that a file holds, to add to.

        Raises:
            ValueError: it does not meet the schema, or is of another program, commit, device or torch.
        """
        document = load(path)
        theirs = document["environment"]
        for name in ("program", "commit", "device", "torch"):
            if theirs[name] != environment[name]:
                raise ValueError(f"{path}: cannot go on with it, its {name} is {theirs[name]}, not {environment[name]}")
        results = cls(theirs, path)
        results.rows = [Row(**row) for row in document["rows"]]
        return results

    def add(self, rows: list[Row]) -> None:
        """Adds rows, fills speedups in, and saves."""
        self.rows += rows
        speedups(self.rows)
        self.save()

    def document(self) -> dict[str, Any]:
        """The file's content.

        Raises:
            ValueError: it would not meet the schema.
        """
        document = {"environment": self.environment, "rows": [dataclasses.asdict(row) for row in self.rows]}
        _refuse(problems(document), "these results")
        return document

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        document = self.document()
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self._path)


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: it does not meet the schema.
    """
    document = json.loads(path.read_text())
    _refuse(problems(document), str(path))
    return dict(document)


def _refuse(found: list[str], what: str) -> None:
    if found:
        shown = "\n  ".join(found[:10])
        raise ValueError(f"{what} do not meet the schema of harness/schema.py:\n  {shown}")
