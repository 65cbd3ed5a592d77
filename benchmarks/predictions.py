"""The cost model's predictions for LLaMA-7B on a Hopper against the floor and the goals, for every road; writes the tables of a note.

    python benchmarks/predictions.py                                          prints them
    python benchmarks/predictions.py --renew docs/notes/predictions.md        and puts them between the note's marks

Predicted, not measured: no GPU is needed, and none is used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.predictions import CASES, Case, Launch, Prediction, launches, predict
from harness.table import markdown

from memvp_kernels.backends.triton import roads

__all__ = ["main", "renewed", "tables"]

_BEGIN, _END = "<!-- predictions: begin -->", "<!-- predictions: end -->"
_FORMS = {"factored": "Factored memory", "formed": "Plain memory, formed"}
_COLUMNS = {
    "case": "case",
    "floor": "floor µs",
    "goal": "goal",
    **{road: road for road in roads.ROADS},
    "chosen": "chosen",
    "steps": "chosen: µs by step (L: by the library)",
    "met": "goal met by, if the model is right",
}

_KERNEL_COLUMNS = {
    "case": "case",
    "step": "kernel",
    "tile": "tile",
    "stages": "stages",
    "shared": "shared KiB",
    "tiles": "tiles",
    "waves": "waves",
    "moved": "MB moved",
    "time": "predicted µs",
}


def tables() -> str:
    """All tables as Markdown."""
    found = []
    for form, title in _FORMS.items():
        rows = [_cells({road: predict(case, form, road) for road in (*roads.ROADS, "chosen")}) for case in CASES]
        found.append(f"### {title}\n\n{markdown(rows, _COLUMNS)}")
    kernels = [_kernel_cells(case, launch) for case in CASES for launch in launches(case)]
    found.append(f"### The fused kernels, plain memory\n\n{markdown(kernels, _KERNEL_COLUMNS)}")
    return "\n\n".join(found)


def _kernel_cells(case: Case, launch: Launch) -> dict[str, object]:
    tile = launch.tile
    halves = "2×" if launch.step == "hidden" else ""
    return {
        "case": case.name,
        "step": launch.step,
        "tile": f"{tile.block_n}×{halves}{tile.columns}×{tile.block_k}"
        + (f" in {tile.splits}" if tile.splits > 1 else ""),
        "stages": tile.stages,
        "shared": launch.shared // 1024,
        "tiles": launch.tiles,
        "waves": f"{launch.waves:.2f}",
        "moved": round(launch.bytes / 1e6),
        "time": round(launch.microseconds),
    }


def _cells(found: dict[str, Prediction]) -> dict[str, object]:
    chosen = found["chosen"]
    case, goal = chosen.case, chosen.case.goal
    marks = {step: " L" for step, road in chosen.taken.items() if road == "library"}
    met = [road for road, p in found.items() if goal is not None and p.over_floor <= goal]
    return {
        "case": case.name,
        "floor": f"{chosen.floor:.0f}",
        "goal": "–" if goal is None else f"≤ {goal:.2f}×",
        **{road: f"{p.total:.0f} ({p.over_floor:.2f}×)" for road, p in found.items()},
        "steps": ", ".join(f"{step}{marks.get(step, '')} {time:.0f}" for step, time in chosen.steps.items()),
        "met": "–" if goal is None else ", ".join(met) or "none",
    }


def renewed(note: str) -> str:
    """The note with the tables between its marks as they are now."""
    before, rest = note.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n\n{tables()}\n\n{_END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--renew", type=Path, help="a note whose tables are replaced")
    options = parser.parse_args(arguments)
    print(tables())
    if options.renew is not None:
        options.renew.write_text(renewed(options.renew.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
