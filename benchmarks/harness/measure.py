"""From variants of one case to its rows: correctness, then peak memory, then time; whatever breaks costs only its own row."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.correctness import judge
from harness.graphs import DeviceLostError, WrongReplayError
from harness.memory import call_peak_bytes, tensor_bytes
from harness.results import Row
from harness.rooflines import Count, Roofs
from harness.timer import Run, Timer

__all__ = ["BrokenDeviceError", "Candidate", "Truth", "held_bytes", "measure"]

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
        build: () → (outputs for the check, or what computes them; the run to time; bytes of the operands that it keeps). Called
            once; may raise. The run's first call comes before outputs that are computed.
        truth: () → what the outputs are judged against; called after build.
        count: its work.
        missing: why it can't run here; then nothing else is called.
        memory_per_image, cache_per_image: of the row.
        note: of the row.
    """

    name: str
    build: Callable[[], tuple[Outputs | Callable[[], Outputs], Run, int]]
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
    late: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Rows of one case. Times are interleaved among all candidates that passed their check.

    Args:
        template: the case's own fields.
        candidates: its variants.
        timer: times them.
        roofs: give the floor.
        host: also measures host time per call (on a GPU).
        progress: called once per candidate and once per round of samples.
        late: whether no further candidate should be begun; those that were not have no row.

    Raises:
        BrokenDeviceError: a variant left the GPU unusable; it holds the rows of the variants before it.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}

    def failed(name: str, error: Exception) -> None:
        """One variant that breaks (memory, a compiler, a wrong replay) must not cost the others their rows."""
        runs.pop(name, None)
        status = "wrong" if isinstance(error, WrongReplayError) else "failed"
        rows[name].leave_out(status, f"{type(error).__name__}: {_first_line(error)}")
        if isinstance(error, DeviceLostError) or not _release(timer.device):
            said = [row for row in rows.values() if row.status != "ok" or row.median_ms is not None]
            raise BrokenDeviceError(name, said) from error

    for candidate in candidates:
        if late():
            break
        row = _row(template, candidate, roofs)
        rows[candidate.name] = row
        if candidate.missing is not None:
            row.leave_out("skipped", candidate.missing)
            continue
        try:
            run = _checked(row, candidate, timer)
            if run is not None:
                runs[candidate.name] = run
        except Exception as error:
            failed(candidate.name, error)
        if progress is not None:
            progress()
    for name, timing in timer.compare(dict(runs), progress=progress, failed=failed).items():
        rows[name].take(timing)
        if host and timer.device.type == "cuda":
            try:
                rows[name].host_us = timer.host_us(runs[name].calls[0])
            except Exception as error:
                rows[name] = _row(template, next(c for c in candidates if c.name == name), roofs)
                failed(name, error)
    runs.clear()
    _release(timer.device)
    return list(rows.values())


class BrokenDeviceError(RuntimeError):
    """The GPU is unusable in this process from here on.

    Attributes:
        variant: that it happened to.
        rows: of the case, as far as they say something.
    """

    def __init__(self, variant: str, rows: list[Row]) -> None:
        super().__init__(f"the GPU is unusable after {variant!r}")
        self.variant = variant
        self.rows = rows


def _row(template: Row, candidate: Candidate, roofs: Roofs) -> Row:
    return dataclasses.replace(
        template,
        variant=candidate.name,
        flops=candidate.count.flops,
        bytes=candidate.count.bytes,
        floor_ms=roofs.floor_ms(candidate.count),
        memory_per_image_bytes=candidate.memory_per_image,
        cache_per_image_bytes=candidate.cache_per_image,
        note=candidate.note,
    )


def _checked(row: Row, candidate: Candidate, timer: Timer) -> Run | None:
    """The candidate's run, its first call, correctness and peak memory in the row; None where it is wrong."""
    outputs, run, held = candidate.build()
    row.first_call_s = timer.first_call(run)
    if callable(outputs):
        outputs = outputs()
    truth = candidate.truth()
    if not row.judge(*judge(outputs, truth.plain, truth.exact)):
        return None
    del outputs
    if run.before is not None:
        run.before()
    peak = call_peak_bytes(run.calls[0], timer.device)
    row.peak_memory_bytes = None if peak is None else held + peak
    assert row.error_allowed is not None
    return dataclasses.replace(run, replay_error=run.replay_depth * row.error_allowed)


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


def _release(device: torch.device) -> bool:
    """Gives memory back; whether the device still works (after an illegal access nothing does, in this process)."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True
