"""From the variants of a case to its rows: correctness against float64, peak memory, then times, interleaved sample by sample."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from options import Setting, environment
from roofline import Count, Peaks
from rows import LOST, Results, Row
from timing import (
    Sampler,
    WrongReplayError,
    first_call,
    first_line,
    measure_peaks,
    peak_bytes,
    relative_error,
    sm_clock,
)
from torch import Tensor

Call = Callable[[], object]
Outputs = Mapping[str, Tensor]

#: Exit status of a program that a variant left without a GPU: with --continue, a new process measures the rest.
AGAIN = 75


@dataclass(frozen=True)
class Truth:
    """What a candidate's outputs are judged against: PyTorch's own in the candidate's dtype, and float64."""

    plain: Outputs
    exact: Outputs


@dataclass(frozen=True)
class Built:
    """A candidate that is ready to run.

    Attributes:
        outputs: computes what the check compares; called after the first of `calls`.
        calls: the timed computation on different operands, used in turn.
        held: bytes of the operands that it keeps.
        graph: may be captured into a CUDA graph: no synchronization, no host decision on data, no autograd.
        depth: how many times more layers are timed than were checked: a graph's replay may be as many times the allowed error off.
    """

    outputs: Callable[[], Outputs]
    calls: Sequence[Call]
    held: int
    graph: bool = True
    depth: float = 1.0


@dataclass
class Candidate:
    """One variant of a case, before it is known to work.

    Attributes:
        variant: the row's.
        build: may raise; called once, before `truth`.
        truth: what the outputs are judged against.
        count: its work.
        missing: why it can't run here; then nothing else is called.
        memory_per_image, cache_per_image, note: of the row.
    """

    variant: str
    build: Callable[[], Built]
    truth: Callable[[], Truth]
    count: Count
    missing: str | None = None
    memory_per_image: int = 0
    cache_per_image: int = 0
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One case of a program.

    Attributes:
        template: the fields that all its rows have.
        candidates: its variants; not called before its turn.
        host: host time per call is of interest.
        gradients: False: all of it runs under torch.no_grad.
    """

    template: Row
    candidates: Callable[[], Sequence[Candidate]]
    host: bool = False
    gradients: bool = True


class LostDeviceError(RuntimeError):
    """After `variant` the GPU is unusable in this process; `rows` are those of the case that say something."""

    def __init__(self, variant: str, rows: list[Row]) -> None:
        super().__init__(f"the GPU is unusable after {variant!r}")
        self.variant, self.rows = variant, rows


def judge(outputs: Outputs, plain: Outputs, exact: Outputs) -> tuple[float, float]:
    """(error, allowed): root mean square of the relative errors of all results, and twice that of plain PyTorch.

    Over all of them together, because a gradient of a few numbers may be right by luck, and nobody reaches twice its error
    then. Never less is allowed than correct rounding of the results costs.

    Raises:
        KeyError: `outputs` lacks one of the results.
    """

    def mean(found: Outputs) -> float:
        errors = [relative_error(found[name], exact[name]) for name in exact]
        return math.sqrt(sum(error * error for error in errors) / len(errors))

    return mean(outputs), max(2 * mean(plain), *(torch.finfo(plain[name].dtype).eps / 2 for name in exact))


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    *,
    device: torch.device,
    samples: int,
    peaks: Peaks,
    progress: Callable[[str], object] = lambda variant: None,
    late: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """The rows of some variants of a case; one that is wrong, breaks or is missing costs only its own row its time.

    Args:
        case: whose.
        candidates: the variants.
        device: measured.
        samples: per variant.
        peaks: for the roofline bound.
        progress: called with each candidate's variant before it is built.
        late: whether no further candidate should be begun; those that were not have no row.

    Raises:
        LostDeviceError: a variant left the GPU unusable.
    """
    rows: dict[str, Row] = {}
    samplers: dict[str, Sampler] = {}

    def failed(name: str, error: Exception) -> None:
        samplers.pop(name, None)
        absent = str(error).startswith("backend: wanted")  # dispatch: this machine or this input can't have the backend
        status = "wrong" if isinstance(error, WrongReplayError) else "skipped" if absent else "failed"
        rows[name].leave_out(status, f"{type(error).__name__}: {first_line(error)}")
        if not _usable(device):
            rows[name].reason += f" ({LOST})"
            raise LostDeviceError(name, [row for row in rows.values() if row.status != "ok"]) from error

    for candidate in candidates:
        if late():
            break
        progress(candidate.variant)
        row = dataclasses.replace(case.template, variant=candidate.variant, note=candidate.note)
        rows[candidate.variant] = row
        row.flops, row.bytes = candidate.count.flops, candidate.count.bytes
        row.roofline_ms = peaks.bound_ms(candidate.count)
        row.memory_per_image_bytes, row.cache_per_image_bytes = candidate.memory_per_image, candidate.cache_per_image
        if candidate.missing is not None:
            row.leave_out("skipped", candidate.missing)
            continue
        try:
            sampler = _checked(row, candidate, device)
            if sampler is not None:
                samplers[candidate.variant] = sampler
        except Exception as error:
            failed(candidate.variant, error)
    progress("samples")
    times: dict[str, list[float]] = {name: [] for name in samplers}
    clocks: list[float] = []
    for turn in range(samples):
        names = list(samplers)
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                times[name].append(samplers[name].sample())
            except Exception as error:
                failed(name, error)
        clocks += sm_clock(device)
    for name in list(samplers):
        try:
            rows[name].host_us = samplers[name].host_us() if case.host and device.type == "cuda" else None
        except Exception as error:
            failed(name, error)
            continue
        rows[name].take(*np.quantile(times[name], (0.5, 0.2, 0.8)).tolist(), samples=samples)
        rows[name].timing = samplers[name].method
        rows[name].note = "; ".join(text for text in (rows[name].note, samplers[name].note) if text)
        rows[name].sm_clock_mhz = float(np.median(clocks)) if clocks else None
    samplers.clear()
    _usable(device)
    return list(rows.values())


def _checked(row: Row, candidate: Candidate, device: torch.device) -> Sampler | None:
    """The candidate ready to be timed; its first call, correctness and peak memory go into the row. None where it is wrong."""
    built = candidate.build()
    row.first_call_s = first_call(built.calls[0])
    truth = candidate.truth()
    if not row.judge(*judge(built.outputs(), truth.plain, truth.exact)):
        return None
    del truth
    peak = peak_bytes(built.calls[0], device)
    row.peak_memory_bytes = None if peak is None else built.held + peak
    assert row.error_allowed is not None
    return Sampler(built.calls, device, graph=built.graph, replay_error=built.depth * row.error_allowed)


def _usable(device: torch.device) -> bool:
    """Gives memory back; whether the device still works (after an illegal access nothing does, in this process)."""
    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


#: On a GPU, where minutes count, these are timed after the others: no claim rests on them.
_LATER = ("concatenated", "factored-eager", "factored-torch", "factored-triton", "liger", "plain-", "positions-")


def _turn(case: Row, variant: str, device: torch.device) -> int:
    """0: timed first, in every case; 1: when all cases have those. On a CPU all are timed together.

    2: the CUDA kernels for large steps, last of all: until a GPU has run them, one that hangs should cost no other's rows.
    """
    if device.type != "cuda":
        return 0
    if case.phase != "decode" and variant.endswith("cuda"):
        return 2
    return int(variant.startswith(_LATER) or variant.endswith("-compile"))


def run(setting: Setting, cases: Sequence[Case]) -> tuple[Results, list[str]]:
    """Measures the cases, the essential variants of all of them before the rest, saving after every few rows.

    Returns:
        The results, and what `--seconds` left no time for.

    Raises:
        SystemExit: AGAIN, after a variant that left the GPU unusable; its row and all before it are saved.
    """
    begun = time.monotonic()
    torch.manual_seed(0)
    device = setting.device
    results = Results(environment(setting), setting.json, go_on=setting.go_on)
    turns = (0, 1, 2) if device.type == "cuda" else (0,)
    left_out: dict[str, None] = {}
    busy: dict[str, set[int]] = {}  # turns in which a case has something to time

    def late() -> bool:
        return setting.seconds is not None and time.monotonic() - begun > setting.seconds

    bar = _progress_bar(len(turns) * len(cases), quiet=setting.quiet)
    bar.set_description("peaks of this machine")
    if "peaks" not in results.environment:
        results.environment["peaks"] = vars(measure_peaks(device, setting.dtype, samples=setting.samples))
    peaks = Peaks(**results.environment["peaks"])
    for turn in turns:
        for case in cases:
            bar.set_description(case.template.case)
            if turn not in busy.get(case.template.case, turns):
                continue
            over = late()
            with torch.set_grad_enabled(case.gradients):
                try:
                    found = [] if over else case.candidates()
                except ImportError as error:  # an optional package: its cases are left out, the others run
                    row = dataclasses.replace(case.template, variant="all")
                    row.leave_out("skipped", str(error))
                    results.add([] if results.has(row.case, row.variant) else [row])
                    continue
                busy[case.template.case] = {_turn(case.template, c.variant, device) for c in found} or set(turns)
                wanted = [c for c in found if _turn(case.template, c.variant, device) == turn]
                wanted = [c for c in wanted if not results.has(case.template.case, c.variant)]
                for candidate in wanted:
                    candidate.missing = candidate.missing or results.lost(candidate.variant)
                try:
                    size = {"device": device, "samples": setting.samples, "peaks": peaks}
                    rows = measure(case, wanted, **size, progress=bar.set_postfix_str, late=late)
                except LostDeviceError as error:
                    results.add(error.rows)
                    _stop(case, error, device)
                results.add(rows)
            if over or len(rows) < len(wanted):
                some = any(row.case == case.template.case for row in results.rows)
                left_out[f"{case.template.case}: some variants" if some else case.template.case] = None
            del found, wanted
            if setting.compiled:
                torch._dynamo.reset()  # past its limit of shapes it would quietly run the eager form
            bar.update()
    bar.close()
    return results, list(left_out)


def _progress_bar(total: int, *, quiet: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return SimpleNamespace(
            **dict.fromkeys(("set_description", "set_postfix_str", "update", "close"), lambda *_: None)
        )
    return tqdm(total=total, file=sys.stderr, dynamic_ncols=True, leave=False, disable=quiet or None)


def _stop(case: Case, error: LostDeviceError, device: torch.device) -> NoReturn:
    print(f"{case.template.case}: {error} ({error.__cause__}); go on with --continue", file=sys.stderr, flush=True)
    if device.type == "cuda":
        sys.stdout.flush()
        os._exit(AGAIN)  # tearing down what was on that GPU may abort, and then the status would be another
    raise SystemExit(AGAIN) from error
