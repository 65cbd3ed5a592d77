"""Result rows, one per case and variant, with everything that makes a time worth reading: kept as JSON, shown as tables."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN_COMMIT, DIRTY = "unknown", "-dirty"

#: What a speedup is over: the fastest of these variants of the case that was timed.
BASELINES = {"prompt": ("prompt", "prompt-compile"), "text": ("text", "text-compile"), "matmul": ("matmul",)}
#: In the reason of a row after which nothing ran any more.
LOST = "the GPU was unusable after it"


@dataclass
class Row:
    """One variant of one case. Times are milliseconds per call, sizes bytes; None means that it does not apply.

    Attributes:
        case, variant, dtype: what was computed, by whom, in which type.
        status, reason: "ok"; "wrong" (the check failed: no speed is given), "skipped" or "failed", and why.
        error, error_allowed: against float64, and twice plain PyTorch's own.
        median_ms, p20_ms, p80_ms, samples, timing: "wall-clock" or "cuda-graph".
        first_call_s: seconds of the variant's first call in this case; kernels that another case compiled, or a cache on disk
            holds, are not compiled again in it.
        speedup_vs_prompt, speedup_vs_text, speedup_vs_matmul: time of that form of the same case, the faster of eager and
            torch.compile, over this one's; under 1 it loses.
        level, phase, preset, layers, sequences, text_length, visual_tokens: the case, for programs.
        peak_memory_bytes: operands that this variant keeps, and the most that the call holds besides.
        memory_per_image_bytes, cache_per_image_bytes: kept per image: MemVP's memory, or the KV cache of its prompt tokens.
        flops, bytes, roofline_ms, percent_of_roofline: of roofline.py; the bound over the median.
        tflops, gbs: flops and bytes over the median.
        host_us: host time that issuing the call takes; on a CPU, where a call ends when its work does, None.
        sm_clock_mhz: median while the case's samples were taken.
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
    roofline_ms: float | None = None
    percent_of_roofline: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    host_us: float | None = None
    sm_clock_mhz: float | None = None
    note: str = ""

    def take(self, median_ms: float, p20_ms: float, p80_ms: float, *, samples: int) -> None:
        """Fills in the times, and the rates that follow from them."""
        self.median_ms, self.p20_ms, self.p80_ms, self.samples = median_ms, p20_ms, p80_ms, samples
        if self.roofline_ms is not None and self.flops is not None and self.bytes is not None:
            self.percent_of_roofline = 100 * self.roofline_ms / median_ms
            self.tflops, self.gbs = self.flops / median_ms / 1e9, self.bytes / median_ms / 1e6

    def judge(self, error: float, allowed: float) -> bool:
        """Records the correctness check; whether the variant may be timed. A wrong row never gets a time."""
        self.error = error if math.isfinite(error) else None
        self.error_allowed = allowed if math.isfinite(allowed) else None
        right = math.isfinite(error) and error <= allowed
        if not right:
            self.leave_out("wrong", f"error {error:.3g} against float64, allowed {allowed:.3g}")
        return right

    def leave_out(self, status: str, reason: str) -> None:
        """No time, and why."""
        self.status, self.reason = status, reason


class Results:
    """A growing result file, saved after every few rows, so that what was measured survives a run that is cut short."""

    def __init__(self, environment: dict[str, Any], path: Path | None = None, *, go_on: bool = False) -> None:
        """Starts a file at `path` (None: in memory alone), or goes on with the one that is there.

        Raises:
            ValueError: that one is of another program, commit, device or torch.
        """
        self.environment = environment
        self.rows: list[Row] = []
        self.path = path
        if go_on and path is not None and path.exists():
            document = json.loads(path.read_text())
            self.environment = document["environment"]
            for name in ("program", "commit", "device", "torch"):
                ours, theirs = environment[name], self.environment[name]
                if ours != theirs:
                    raise ValueError(f"{path}: can't go on with it, its {name} is {theirs}, not {ours}")
            self.rows = [Row(**row) for row in document["rows"]]

    def has(self, case: str, variant: str) -> bool:
        return any((row.case, row.variant) == (case, variant) for row in self.rows)

    def lost(self, variant: str) -> str | None:
        """Why a variant is not tried again: it broke the GPU before."""
        found = next((row.case for row in self.rows if row.variant == variant and LOST in row.reason), None)
        return None if found is None else f"left out: {LOST} in {found!r}"

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, fills the speedups in, and saves."""
        self.rows += rows
        medians = {(row.case, row.variant): row.median_ms for row in self.rows if row.median_ms is not None}
        for row in self.rows:
            for baseline, names in BASELINES.items():
                theirs = [medians[row.case, name] for name in names if (row.case, name) in medians]
                if theirs and row.median_ms is not None:
                    setattr(row, f"speedup_vs_{baseline}", min(theirs) / row.median_ms)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n")
            partial.replace(self.path)

    @property
    def exit_status(self) -> int:
        """1 when a variant was wrong or broke."""
        return int(any(row.status in ("wrong", "failed") for row in self.rows))

    def document(self) -> dict[str, Any]:
        """The file's content."""
        return {"environment": self.environment, "rows": [dataclasses.asdict(row) for row in self.rows]}


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not use one."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}" if value else "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(float(f'{abs(value):.2e}'))))}f}"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, style: str = "simple") -> str:
    """The rows under the columns' headings, for a terminal ("simple") or as Markdown ("pipe"); None shows as "–"."""

    def cell(value: Any) -> str:
        return "–" if value is None else number(value) if isinstance(value, float) else str(value)

    cells = [[cell(row.get(key)) for key in columns] for row in rows]
    try:
        from tabulate import tabulate
    except ImportError:
        return "\n".join("\t".join(line) for line in [list(columns.values()), *cells])
    right = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns]
    alignment = ["right" if numeric else "left" for numeric in right]
    return tabulate(cells, list(columns.values()), style, colalign=alignment, disable_numparse=True)


COLUMNS = {
    "variant": "variant",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "speedup_vs_prompt": "× prompt",
    "speedup_vs_text": "× text only",
    "percent_of_roofline": "% of roofline",
    "peak_mb": "peak MB",
    "image_mb": "MB/image",
    "error": "error",
    "verdict": "",
}


def cells(row: Row) -> dict[str, Any]:
    """A row's fields with sizes in MB and what went wrong in words."""
    image = (row.memory_per_image_bytes or 0) + (row.cache_per_image_bytes or 0)
    return {
        **vars(row),
        "peak_mb": None if row.peak_memory_bytes is None else row.peak_memory_bytes / 1e6,
        "image_mb": image / 1e6 if row.status == "ok" else None,
        "verdict": "" if row.status == "ok" else f"{row.status}: {row.reason:.90}",
    }


def show(
    results: Results,
    left_out: Sequence[str] = (),
    *,
    columns: Mapping[str, str] = COLUMNS,
    cells: Callable[[Row], Mapping[str, Any]] = cells,
) -> None:
    """Prints what was measured on, one table per case, what `--seconds` left no time for, and where the file is."""
    environment = results.environment
    if environment["commit"].endswith(DIRTY) or environment["commit"] == UNKNOWN_COMMIT:
        print(f"commit {environment['commit']}: not a state that anyone else can measure again")
    print(f"{environment['device']}, torch {environment['torch']}, commit {environment['commit'][:12]}")
    peaks = {name: number(value) for name, value in environment["peaks"].items()}
    print(
        f"measured peaks: matmul {peaks['matmul_tflops']} TFLOP/s, copy {peaks['copy_gbs']} GB/s, read {peaks['stream_gbs']} GB/s; "
        "× is the other variant's time over this one's"
    )
    cases: dict[str, list[Row]] = {}
    for row in results.rows:
        cases.setdefault(row.case, []).append(row)
    for case, rows in cases.items():
        lines = [cells(row) for row in rows]
        shown = {key: text for key, text in columns.items() if any(line[key] not in (None, "") for line in lines)}
        print(f"\n{case}, {rows[0].preset}, {rows[0].dtype}\n{table(lines, shown)}")
    if left_out:
        print("\nnot begun, because --seconds were over:", *left_out, sep="\n  ")
    if results.path is not None:
        print(f"\nrows: {results.path}")
