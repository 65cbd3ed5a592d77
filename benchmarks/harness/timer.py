"""The one timer: interleaved samples, operands rotated past the cache, CUDA graphs on a GPU, wall clock on a CPU."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Run", "Timer", "Timing", "operand_sets", "percentile"]

Call = Callable[[], object]

_Event: Any = torch.cuda.Event  # untyped in torch
_Stream: Any = torch.cuda.Stream

#: A sample shorter than this is mostly clock resolution and launch overhead, so short calls are repeated within one sample.
SHORTEST_SAMPLE_MS = {"cpu": 1.0, "cuda": 1.0}
#: Operands are rotated until together they are this many times the last-level cache.
CACHE_MULTIPLE = {"cpu": 4, "cuda": 10}
_L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
MOST_OPERAND_SETS = 64


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, interpolated linearly between neighbours."""
    if not samples:
        raise ValueError("percentile: wanted at least one sample, got none")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


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
    """

    calls: Sequence[Call]
    graph: bool = True
    before: Call | None = None

    def __post_init__(self) -> None:
        if not self.calls:
            raise ValueError("Run.calls: wanted at least one call, got none")


@dataclass(frozen=True)
class Timing:
    """Samples of one variant, in milliseconds per call.

    Attributes:
        samples: one value per sample, in the order taken.
        method: "wall-clock", "cuda-events" or "cuda-graph".
        first_call_s: seconds that the very first call took (compilation included).
        calls_per_sample: calls that one sample averages over.
        note: why a CUDA graph was not used where one was allowed.
    """

    samples: tuple[float, ...]
    method: str
    first_call_s: float
    calls_per_sample: int
    note: str = ""

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
    first_call_s: float
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
        self._clock = clock

    def compare(self, runs: Mapping[str, Run], *, progress: Call | None = None) -> dict[str, Timing]:
        """Times all variants, interleaved: every round takes one sample of each, starting with another variant each time.

        A drift of the clock, the temperature or a neighbour's load then meets all variants alike.

        Args:
            runs: the variants by name.
            progress: called after every round.
        """
        prepared = {name: self._prepare(run) for name, run in runs.items()}
        names = list(prepared)
        for turn in range(self.samples):
            shift = turn % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                prepared[name].samples.append(prepared[name].sample())
            if progress is not None:
                progress()
        return {
            name: Timing(tuple(p.samples), p.method, p.first_call_s, p.calls_per_sample, p.note)
            for name, p in prepared.items()
        }

    def host_us(self, call: Call, *, calls: int = 200) -> float:
        """Microseconds of host time that issuing one call takes, outside a CUDA graph; the device may lag behind.

        Args:
            call: asynchronous on a GPU, so that returning from it means issued, not done.
            calls: how many are issued in a row; the median of five such rows is returned.
        """
        rows = []
        for _ in range(5):
            self._synchronize()
            start = self._clock()
            for _ in range(calls):
                call()
            rows.append((self._clock() - start) * 1e6 / calls)
            self._synchronize()
        return percentile(rows, 0.5)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _prepare(self, run: Run) -> _Prepared:
        start = self._clock()
        if run.before is not None:
            run.before()
        run.calls[0]()
        self._synchronize()
        first_call_s = self._clock() - start
        estimate_ms = self._warm_up(run)
        repeat = self._calls_per_sample(run, estimate_ms)
        if self.device.type != "cuda":
            return _Prepared(self._wall_clock(run, repeat), "wall-clock", first_call_s, repeat)
        note = ""
        if run.graph and run.before is None:
            try:
                graph = self._capture(run, repeat)
                return _Prepared(self._replay(graph, repeat), "cuda-graph", first_call_s, repeat)
            except RuntimeError as error:  # not capturable: say so in the row and time it with events
                torch.cuda.synchronize(self.device)
                note = f"no CUDA graph: {str(error).splitlines()[0][:160]}"
        return _Prepared(self._events(run, repeat), "cuda-events", first_call_s, repeat, note)

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
        begin = _Event(enable_timing=True)
        end = _Event(enable_timing=True)
        turn = 0

        def sample() -> float:
            nonlocal turn
            if run.before is not None:
                run.before()
            begin.record()
            for _ in range(repeat):
                run.calls[turn % len(run.calls)]()
                turn += 1
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / repeat

        return sample

    def _capture(self, run: Run, repeat: int) -> torch.cuda.CUDAGraph:
        side = _Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # libraries allocate their workspaces for the capturing stream beforehand
            for call in run.calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(repeat):
                run.calls[turn % len(run.calls)]()
        graph.replay()
        self._synchronize()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, repeat: int) -> Callable[[], float]:
        begin = _Event(enable_timing=True)
        end = _Event(enable_timing=True)

        def sample() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / repeat

        return sample
