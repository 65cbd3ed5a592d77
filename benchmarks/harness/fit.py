"""The cost model's rates as a GPU's rows of benchmarks/kernels.py would have them, and how far off its times are with them and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import least_squares

from harness.presets import PRESETS
from harness.rooflines import FFNShape
from memvp_kernels.backends.triton import launch, roads, tiles
from memvp_kernels.backends.triton.rates import RATES, Rates
from memvp_kernels.backends.triton.shape import Shape
from memvp_kernels.backends.triton.tiles import Chip

__all__ = ["Observation", "fitted", "observations"]

_ROAD = {"triton": "fused", **{road: road for road in roads.ROADS if road != "fused"}}  # by a row's variant
_LEAST, _MOST = 0.05, 2.0  # of a rate


@dataclass(frozen=True)
class Observation:
    """One step on one road as it was timed.

    Attributes:
        case: for people.
        seconds: median.
    """

    case: str
    chip: Chip
    shape: Shape
    step: str
    road: str
    seconds: float

    def predicted(self, rates: Rates) -> float:
        """Seconds by the model."""
        return roads.step_cycles(self.chip, self.shape, self.step, self.road, rates) / (self.chip.clock * 1e9)

    def off(self, rates: Rates) -> float:
        """Predicted over measured."""
        return self.predicted(rates) / self.seconds


def observations(document: dict[str, Any]) -> list[Observation]:
    """The timed steps in a result file of benchmarks/kernels.py; empty for one of a CPU.

    Their case is a gated FFN with a plain memory per sequence (harness.kernel_case).
    """
    environment = document["environment"]
    if environment["device_type"] != "cuda":
        return []
    major, minor = map(int, environment["capability"].split("."))
    chip = tiles.chip_of(10 * major + minor, environment.get("multiprocessors"))
    found = []
    for row in document["rows"]:
        step = str(row["phase"]).removeprefix("kernel ")
        if row["median_ms"] is None or row["variant"] not in _ROAD or step not in roads.STEPS:
            continue
        sizes = {"sequences": row["sequences"], "tokens": row["text_length"]}
        dtype = getattr(torch, row["dtype"])
        of = FFNShape.of(PRESETS[row["preset"]], visual_tokens=row["visual_tokens"], element=dtype.itemsize, **sizes)
        shape = Shape(
            dtype=dtype, precision=launch.precision(dtype), rows=of.sequences * of.tokens, width=of.width, pairs=of.pairs, slots=of.slots,
            sequences=of.sequences, length=of.tokens, gated=True, descriptors=True,
        )  # fmt: skip
        found.append(Observation(row["case"], chip, shape, step, _ROAD[row["variant"]], row["median_ms"] / 1e3))
    return found


def fitted(found: Sequence[Observation], start: Rates = RATES) -> Rates:
    """The rates with which the model's times lie closest to the measured ones, by the squares of their ratios' logarithms.

    Only rates that an observation depends on are moved, launches excepted: a step of these sizes says little of them.
    """
    names = [name for name in Rates._fields if name not in ("launch", "chained") and _matters(name, found, start)]
    if not names:
        return start

    def with_rates(logarithms: Sequence[float]) -> Rates:
        return start._replace(**{name: math.exp(v) for name, v in zip(names, logarithms, strict=True)})

    def distances(logarithms: Sequence[float]) -> list[float]:
        rates = with_rates(logarithms)
        return [math.log(o.off(rates)) for o in found]

    at = [math.log(getattr(start, name)) for name in names]
    solution = least_squares(distances, at, bounds=(math.log(_LEAST), math.log(_MOST)))
    return with_rates([float(v) for v in solution.x])


def _matters(name: str, found: Sequence[Observation], rates: Rates) -> bool:
    slower = rates._replace(**{name: getattr(rates, name) / 2})
    return any(o.predicted(slower) != o.predicted(rates) for o in found)
