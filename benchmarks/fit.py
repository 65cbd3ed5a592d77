"""Fits the cost model's rates to what benchmarks/kernels.py measured on a GPU, and says how far off the model was and is.

    python benchmarks/fit.py                                              every committed GPU
    python benchmarks/fit.py benchmarks/results/nvidia-h200/kernels.json

The rates that it prints belong into memvp_kernels/backends/triton/rates.py; the tables of docs/notes/predictions.md then follow by
`python benchmarks/predictions.py --renew`. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from harness.fit import Observation, fitted, observations
from harness.results import load
from harness.table import text

from memvp_kernels.backends.triton.rates import RATES, Rates

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"
_COLUMNS = {
    "case": "case",
    "road": "road",
    "measured": "measured µs",
    "before": "model µs",
    "off": "off by",
    "after": "fitted µs",
    "left": "off by, fitted",
}


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each GPU; the exit status is 1 where no file has rows to fit."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files of kernels.py; default: all under benchmarks/results"
    )
    files: list[Path] = parser.parse_args(arguments).files or sorted(RESULTS.glob("*/kernels.json"))
    fits = 0
    for file in files:
        document = load(file)
        found = observations(document)
        if found:
            _show(str(document["environment"]["device"]), found)
            fits += 1
    if not fits:
        print(
            f"no step of a GPU in {', '.join(map(str, files)) or RESULTS}: the rates stay the assumptions that they are"
        )
    return int(not fits)


def _show(device: str, found: list[Observation]) -> None:
    rates = fitted(found)
    rows = [
        {
            "case": o.case,
            "road": o.road,
            "measured": f"{o.seconds * 1e6:.0f}",
            "before": f"{o.predicted(RATES) * 1e6:.0f}",
            "off": f"{o.off(RATES) - 1:+.0%}",
            "after": f"{o.predicted(rates) * 1e6:.0f}",
            "left": f"{o.off(rates) - 1:+.0%}",
        }
        for o in found
    ]
    print(f"{device}\n{text(rows, _COLUMNS)}\n")
    for name, of in (("as it is", RATES), ("fitted", rates)):
        print(f"the model {name}: off by {_spread(found, of):.1%} (root mean square), at worst {_worst(found, of):.1%}")
    moved = {name: (old, new) for name, old, new in zip(Rates._fields, RATES, rates, strict=True) if old != new}
    print("".join(f"\n    {name}: float = {new:.3f}  # was {old:g}" for name, (old, new) in moved.items()), end="\n\n")


def _spread(found: list[Observation], rates: Rates) -> float:
    return math.sqrt(sum(math.log(o.off(rates)) ** 2 for o in found) / len(found))


def _worst(found: list[Observation], rates: Rates) -> float:
    return max(abs(o.off(rates) - 1) for o in found)


if __name__ == "__main__":
    sys.exit(main())
