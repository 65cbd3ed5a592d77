"""The one timer: interleaved samples, operands rotated past the cache, CUDA graphs on a GPU, wall clock on a CPU."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.clocks import ClockLog, summarise
from harness.graphs import Captured, NotCapturableError, capture, check_replay, tensors_of
from harness.percentile import percentile

__all__ = ["Run", "Timer", "Timing", "operand_sets"]

Call = Callable[[], object]
_T = TypeVar("_T")

_Event: Any = torch.cuda.Event  # untyped in torch

#: A sample shorter than this is mostly clock resolution and launch overhead, so short calls are repeated within one sample.
SHORTEST_SAMPLE_MS = {"cpu": 1.0, "cuda": 1.0}
#: Operands are rotated until together they are this many times the last-level cache.
CACHE_MULTIPLE = {"cpu": 4, "cuda": 10}
#: The GPU spins this long (about half a millisecond) before a sample, so that its work is queued when the first event passes.
_QUEUE_CYCLES = 1_000_000
#: Calls issued between two synchronisations when host time is measured: more could fill the launch queue, and then the host waits.
_HOST_CALLS = 10
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
MOST_OPERAND_SETS = 64


def operand_sets(set_bytes: int, device: torch.device, *, memory_limit: int | None = None) -> int:
    """How many copies of one call's operands it takes to run cold: several times the cache, within the memory there is.

    One layer's weights used in a loop stay partly in the cache and flatter the result; a real model never meets a
    layer's weights twice in a row.

    Args:
        set_bytes: bytes that one call reads.
        device: its cache decides.
        memory_limit: bytes that all sets together may take; default a quarter of the free memory on a GPU, 1 GiB on a CPU.
    """
    cache = _cpu_cache_bytes()
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        if memory_limit is None:
            memory_limit = torch.cuda.mem_get_info(device)[0] // 4
    if memory_limit is None:
        memory_limit = 2**30
    set_bytes = max(set_bytes, 1)
    wanted = math.ceil(CACHE_MULTIPLE[device.type] * cache / set_bytes)
    return max(1, min(wanted, memory_limit // set_bytes, MOST_OPERAND_SETS))


@functools.cache
def _cpu_cache_bytes() -> int:
    """Of the last level, as Linux tells it; elsewhere 32 MiB, a common size."""
    found = re.fullmatch(r"(\d+)K", _L3.read_text().strip()) if _L3.exists() else None
    return int(found[1]) * 1024 if found else 32 * 2**20


@dataclass(frozen=True)
class Run:
    """One variant as the timer sees it.

    Attributes:
        calls: the same computation on different operands, used in turn.
        graph: may be captured into a CUDA graph (no synchronisation, no host decision on data). Ignored on a CPU.
        before: runs, untimed, before every sample (to clear gradients, say). Forces one call per sample.
        replay_depth: times the check's allowed error that a CUDA graph's replay may be off the call itself: where a model of
            more layers is timed than was checked, rounding goes through as many more.
        replay_error: that limit, relative; infinite: replays are not compared.
    """

    calls: Sequence[Call]
    graph: bool = True
    before: Call | None = None
    replay_depth: float = 1.0
    replay_error: float = math.inf

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("Run.calls: wanted at least one call, got none")


@dataclass(frozen=True)
class Timing:
    """Samples of one variant, in milliseconds per call.

    Attributes:
        samples: one value per sample, in the order taken.
        method: "wall-clock", "cuda-events" or "cuda-graph".
        calls_per_sample: calls that one sample averages over.
        note: why a CUDA graph was not used where one was allowed.
        clocks: of harness.clocks.summarise, over all samples of the comparison.
    """

    samples: tuple[float, ...]
    method: str
    calls_per_sample: int
    note: str = ""
    clocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        return percentile(self.samples, 0.5)

    @property
    def p20_ms(self) -> float:
        return percentile(self.samples, 0.2)

    @property
    def p80_ms(self) -> float:
        return percentile(self.samples, 0.8)


@dataclass
class _Prepared:
    """A warmed-up variant: `sample` takes one sample and returns its milliseconds per call."""

    sample: Callable[[], float]
    method: str
    calls_per_sample: int
    note: str = ""
    samples: list[float] = field(default_factory=list)


class Timer:
    """Times variants against one another, sample by sample.

    Args:
        device: where the calls run.
        samples: samples per variant.
        warmup_ms: milliseconds for which each variant runs untimed, so that clocks, caches and lazy set-up settle.
        clock: the wall clock, in seconds; another one only in the timer's own tests.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        samples: int = 20,
        warmup_ms: float = 50.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples: wanted at least 1, got {samples}")
        if warmup_ms < 0:
            raise ValueError(f"warmup_ms: wanted at least 0, got {warmup_ms}")
        self.device = device
        self.samples = samples
        self.warmup_ms = warmup_ms
        self.clocks = ClockLog(device)
        self._clock = clock

    def first_call(self, run: Run) -> float:
        """Seconds that a run's first call takes, whatever is compiled or looked up then included."""
        if run.before is not None:
            run.before()
        self._synchronize()
        start = self._clock()
        run.calls[0]()
        self._synchronize()
        return self._clock() - start

    def compare(
        self,
        runs: Mapping[str, Run],
        *,
        progress: Call | None = None,
        failed: Callable[[str, Exception], object] | None = None,
    ) -> dict[str, Timing]:
        """Times all variants, interleaved: every round takes one sample of each, starting with another variant each time.

        A drift of the clock, the temperature or a neighbour's load then meets all variants alike.

        Args:
            runs: the variants by name.
            progress: called after every round.
            failed: called with the name and the error of a variant that breaks, which then has no timing; None: it raises.
        """

        def attempt(name: str, action: Callable[[], _T]) -> _T | None:
            try:
                return action()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                return None

        prepared: dict[str, _Prepared] = {}
        for name, run in runs.items():
            made = attempt(name, functools.partial(self._prepare, run))
            if made is not None:
                prepared[name] = made
        with self.clocks.window() as readings:
            for turn in range(self.samples):
                names = list(prepared)
                shift = turn % max(1, len(names))
                for name in names[shift:] + names[:shift]:
                    sample = attempt(name, prepared[name].sample)
                    if sample is None:
                        del prepared[name]
                    else:
                        prepared[name].samples.append(sample)
                if progress is not None:
                    progress()
        clocks = summarise(readings)
        return {
            name: Timing(tuple(p.samples), p.method, p.calls_per_sample, p.note, clocks) for name, p in prepared.items()
        }

    def host_us(self, call: Call, *, rounds: int = 5) -> float:
        """Microseconds of host time that issuing one call takes, outside a CUDA graph; the device may lag behind.

        Args:
            call: asynchronous on a GPU, so that returning from it means issued, not done.
            rounds: how often a few calls are issued in a row, to an idle device; the median is returned.
        """
        found = []
        for _ in range(rounds):
            self._synchronize()
            start = self._clock()
            for _ in range(_HOST_CALLS):
                call()
            found.append((self._clock() - start) * 1e6 / _HOST_CALLS)
        self._synchronize()
        return percentile(found, 0.5)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _prepare(self, run: Run) -> _Prepared:
        estimate_ms = self._warm_up(run)
        repeat = self._calls_per_sample(run, estimate_ms)
        if self.device.type != "cuda":
            return _Prepared(self._wall_clock(run, repeat), "wall-clock", repeat)
        note = ""
        if run.graph and run.before is None:
            expected = [tensor.detach().clone() for tensor in tensors_of(run.calls[0]())]
            try:
                captured = capture(run.calls, repeat, self.device)
                if math.isfinite(run.replay_error):
                    check_replay(captured, expected, run.replay_error)
                return _Prepared(self._replay(captured, repeat), "cuda-graph", repeat)
            except NotCapturableError as error:  # say so in the row and time it with events
                note = f"no CUDA graph: {error}"
        return _Prepared(self._events(run, repeat), "cuda-events", repeat, note)

    def _warm_up(self, run: Run) -> float:
        """Runs for warmup_ms, at least once over every operand set; returns milliseconds per call."""
        start = self._clock()
        done = 0
        elapsed = 0.0
        while done < len(run.calls) or elapsed < self.warmup_ms:
            if run.before is not None:
                run.before()
            run.calls[done % len(run.calls)]()
            done += 1
            if self.device.type != "cuda" or done % 10 == 0 or done < 10:
                self._synchronize()
            elapsed = (self._clock() - start) * 1e3
        self._synchronize()
        return (self._clock() - start) * 1e3 / done

    def _calls_per_sample(self, run: Run, estimate_ms: float) -> int:
        if run.before is not None:
            return 1
        shortest = SHORTEST_SAMPLE_MS["cuda" if self.device.type == "cuda" else "cpu"]
        wanted = max(1, math.ceil(shortest / max(estimate_ms, 1e-4)))
        # A whole number of turns over the operands, so that every sample reads the same ones.
        return wanted if wanted == 1 else math.ceil(wanted / len(run.calls)) * len(run.calls)

    def _wall_clock(self, run: Run, repeat: int) -> Callable[[], float]:
        turn = 0

        def sample() -> float:
            nonlocal turn
            if run.before is not None:
                run.before()
            start = self._clock()
            for _ in range(repeat):
                run.calls[turn % len(run.calls)]()
                turn += 1
            return (self._clock() - start) * 1e3 / repeat

        return sample

    def _events(self, run: Run, repeat: int) -> Callable[[], float]:
        turn = 0

        def calls() -> None:
            nonlocal turn
            for _ in range(repeat):
                run.calls[turn % len(run.calls)]()
                turn += 1

        return self._between_events(calls, repeat, before=run.before)

    def _replay(self, captured: Captured, repeat: int) -> Callable[[], float]:
        return self._between_events(captured.replay, repeat)

    def _between_events(self, work: Call, repeat: int, before: Call | None = None) -> Callable[[], float]:
        begin = _Event(enable_timing=True)
        end = _Event(enable_timing=True)

        def sample() -> float:
            if before is not None:
                before()
            torch.cuda._sleep(_QUEUE_CYCLES)
            begin.record()
            work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / repeat

        return sample
