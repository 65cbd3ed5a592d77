"""What a program prints when it is done: one table per case, what was left out, where the files are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import table
from harness.cli import Setting
from harness.commit import DIRTY, UNKNOWN_COMMIT
from harness.results import Results, Row

__all__ = ["COLUMNS", "cells", "show"]

COLUMNS = {
    "variant": "variant",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "speedup_vs_prompt": "× prompt",
    "speedup_vs_text": "× text only",
    "percent_of_floor": "% of floor",
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
    setting: Setting,
    *,
    left_out: Sequence[str] = (),
    columns: Mapping[str, str] = COLUMNS,
    cells: Callable[[Row], Mapping[str, Any]] = cells,
) -> None:
    """Prints the tables, the speedups' meaning and the files.

    Args:
        results: measured.
        setting: names the files.
        left_out: cases that `--seconds` left no time for, in whole or in part.
        columns: of the tables.
        cells: a row's values by column.
    """
    environment = results.environment
    if environment["commit"].endswith(DIRTY) or environment["commit"] == UNKNOWN_COMMIT:
        print(f"commit {environment['commit']}: not a state that anyone else can measure again")
    print(
        f"{environment['device']}, {setting.dtype_name}, {setting.preset_name}, torch {environment['torch']}, commit {environment['commit'][:12]}"
    )
    roofs = environment["roofs"]
    print(
        f"roofs here: matmul {table.number(roofs['matmul_tflops'])} TFLOP/s, copy {table.number(roofs['copy_gbs'])} GB/s, "
        f"read-only {table.number(roofs['stream_gbs'])} GB/s; times in ms, × = the other variant's time over this one's"
    )
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in results.rows:
        cases.setdefault(row.case, []).append(cells(row))
    shown = {key: heading for key, heading in columns.items() if key != "host_us" or setting.device.type == "cuda"}
    for case, lines in cases.items():
        print(f"\n{case}")
        print(table.text(lines, shown))
    if left_out:
        print(f"\nnot begun, because --seconds {setting.seconds:g} were over:", *left_out, sep="\n  ")
    if setting.json is not None:
        print(f"\nrows: {setting.json}")
