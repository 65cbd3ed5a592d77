"""From variants of one case to its rows: correctness, then peak memory, then time; whatever breaks costs only its own row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.correctness import judge
from harness.memory import call_peak_bytes, tensor_bytes
from harness.results import Row
from harness.rooflines import Count, Roofs
from harness.timer import Run, Timer

__all__ = ["Candidate", "Truth", "held_bytes", "measure"]

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What a candidate's outputs are held against.

    Attributes:
        plain: PyTorch's own, in the candidate's dtype.
        exact: in float64.
    """

    plain: Outputs
    exact: Outputs


@dataclass
class Candidate:
    """One variant of a case, before it is known to work.

    Attributes:
        name: the row's variant.
        build: () → (outputs for the check, the run to time, bytes of the operands that it keeps). Called once; may raise.
        truth: () → what the outputs are judged against; called after build.
        count: its work.
        missing: why it can't run here; then nothing else is called.
        memory_per_image, cache_per_image: of the row.
        note: of the row.
    """

    name: str
    build: Callable[[], tuple[Outputs, Run, int]]
    truth: Callable[[], Truth]
    count: Count
    missing: str | None = None
    memory_per_image: int = 0
    cache_per_image: int = 0
    note: str = ""


def measure(
    template: Row,
    candidates: Sequence[Candidate],
    *,
    timer: Timer,
    roofs: Roofs,
    host: bool = False,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Rows of one case. Times are interleaved among all candidates that passed their check.

    Args:
        template: the case's own fields.
        candidates: its variants.
        timer: times them.
        roofs: give the floor.
        host: also measures host time per call (on a GPU).
        progress: called once per candidate and once per round of samples.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for candidate in candidates:
        row = dataclasses.replace(
            template,
            variant=candidate.name,
            flops=candidate.count.flops,
            bytes=candidate.count.bytes,
            floor_ms=roofs.floor_ms(candidate.count),
            memory_per_image_bytes=candidate.memory_per_image,
            cache_per_image_bytes=candidate.cache_per_image,
            note=candidate.note,
        )
        rows[candidate.name] = row
        if candidate.missing is not None:
            row.leave_out("skipped", candidate.missing)
            continue
        try:
            outputs, run, held = candidate.build()
            truth = candidate.truth()
            if row.judge(*judge(outputs, truth.plain, truth.exact)):
                del outputs
                if run.before is not None:
                    run.before()
                peak = call_peak_bytes(run.calls[0], timer.device)
                row.peak_memory_bytes = None if peak is None else held + peak
                runs[candidate.name] = run
        except Exception as error:  # one variant that breaks (memory, a compiler) must not cost the others their rows
            row.leave_out("failed", f"{type(error).__name__}: {_first_line(error)}")
            _release(timer.device)
        if progress is not None:
            progress()
    for name, timing in timer.compare(runs, progress=progress).items():
        rows[name].take(timing)
        if host and timer.device.type == "cuda":
            calls = max(10, min(200, int(20 / timing.median_ms)))
            rows[name].host_us = timer.host_us(runs[name].calls[0], calls=calls)
    runs.clear()
    _release(timer.device)
    return list(rows.values())


def held_bytes(*things: Any) -> int:
    """Bytes of all distinct tensors in the given tensors, dataclasses, lists and tuples."""
    found: list[Tensor] = []

    def look(thing: Any) -> None:
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                look(item)
        elif dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                look(getattr(thing, field.name))

    look(things)
    return tensor_bytes(*found)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
