"""One sample of a call at a time: warm, on operands that have left the cache, and on a GPU by replaying a CUDA graph.

triton.testing.do_bench times one callable to its end, so a drift of the clock would meet one variant and not the next; samples of
several variants can be interleaved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from roofline import Peaks
from torch import Tensor
from torch.utils.benchmark import timer as synchronized_clock

Call = Callable[[], object]

#: Operands are rotated until together they are this many times the last-level cache.
CACHE_MULTIPLE = {"cpu": 4, "cuda": 10}
MOST_OPERAND_SETS = 64
WARM_UP_S = 0.05
#: A shorter sample is mostly clock resolution and launch latency, so short calls are repeated within one sample.
SHORTEST_SAMPLE_S = {"cpu": 1e-3, "cuda": 5e-3}


class NotCapturableError(RuntimeError):
    """The calls can't be captured into a CUDA graph."""


class WrongReplayError(RuntimeError):
    """A graph's replay does not give what the call gave."""


class Sampler:
    """A warmed-up variant, one sample at a time."""

    def __init__(self, calls: Sequence[Call], device: torch.device, *, graph: bool, replay_error: float) -> None:
        """The calls do the same on different operands, and are used in turn."""
        self._call, self._calls = calls[0], len(calls)
        turn = itertools.cycle(calls)
        self._run: Call = lambda: next(turn)()
        estimate = self._warm_up()
        self.method, self.note = "wall-clock", ""
        if device.type == "cuda" and graph:
            try:
                self._run = _captured(calls, device, replay_error)
                self._calls, self.method = 1, "cuda-graph"
                estimate *= len(calls)
            except NotCapturableError as error:
                self.note = f"no CUDA graph: {error}"
        repeat = math.ceil(SHORTEST_SAMPLE_S[device.type] / max(estimate, 1e-7))
        # A whole number of turns over the operands, so that every sample reads the same ones.
        self._repeat = repeat if repeat == 1 else math.ceil(repeat / self._calls) * self._calls
        self._per_call = self._repeat * (len(calls) if self.method == "cuda-graph" else 1)

    def _warm_up(self) -> float:
        """Seconds per call, after every operand set was used and clocks and caches had time to settle."""
        done, elapsed, start = 0, 0.0, time.perf_counter()
        while done < self._calls or time.perf_counter() - start < WARM_UP_S:
            elapsed += timeit.Timer(self._run, timer=synchronized_clock).timeit(1)
            done += 1
        return elapsed / done

    def sample(self) -> float:
        """Milliseconds per call."""
        return 1e3 * timeit.Timer(self._run, timer=synchronized_clock).timeit(self._repeat) / self._per_call

    def host_us(self) -> float:
        """Microseconds of host time that issuing one call takes outside a graph, ten at a time on an idle device."""
        found = []
        for _ in range(5):
            synchronized_clock()
            found.append(timeit.timeit(self._call, number=10) / 10 * 1e6)
        return float(np.median(found))


def _captured(calls: Sequence[Call], device: torch.device, allowed: float) -> Call:
    """The replay of a graph that holds every call once.

    Raises:
        NotCapturableError: a call synchronizes, or does something else that a graph can't hold.
        WrongReplayError: the replay is more than `allowed` off what the first call gives.
    """
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")  # finds most of what can't be captured, while that is still harmless
    try:
        expected = [tensor.detach().clone() for tensor in _tensors(calls[0]())]
        for call in calls:
            call()
    except RuntimeError as error:
        raise NotCapturableError(first_line(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)
    stream, graph, pool = torch.cuda.current_stream(device), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            results = [call() for call in calls]
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError, AttributeError):  # or the allocator goes on recording into the pool
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise NotCapturableError(first_line(error.__context__ or error)) from error
    finally:
        torch.cuda.set_stream(stream)  # a failed capture leaves its side stream current
    tensors = _tensors(results[0])
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.detach().fill_(math.nan)
    graph.replay()
    errors = [relative_error(tensor, exact) for tensor, exact in zip(tensors, expected, strict=True)]
    if any(error > allowed for error in errors):
        raise WrongReplayError(f"a CUDA graph's replay is {max(errors):.3g} off the call, allowed {allowed:.3g}")
    return graph.replay


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖; infinite where `out` is not finite or has another shape."""
    if out.shape != exact.shape or not bool(torch.isfinite(out).all()):
        return math.inf
    size = exact.detach().double().norm().item()
    difference = (out.detach().double() - exact.detach().double()).norm().item()
    return difference / size if size else difference


def first_call(call: Call) -> float:
    """Seconds that a first call takes, whatever is compiled or looked up then included."""
    return timeit.Timer(call, timer=synchronized_clock).timeit(1)


def operand_sets(set_bytes: int, device: torch.device) -> int:
    """How many copies of one call's operands it takes to run cold: several times the cache, within a quarter of the memory.

    A real model never meets a layer's weights twice in a row; one layer's weights in a loop stay in the cache and flatter the result.
    """
    cache, limit = _cpu_cache_bytes(), 2**30
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        limit = torch.cuda.mem_get_info(device)[0] // 4
    wanted = math.ceil(CACHE_MULTIPLE[device.type] * cache / max(set_bytes, 1))
    return max(1, min(wanted, limit // max(set_bytes, 1), MOST_OPERAND_SETS))


@functools.cache
def _cpu_cache_bytes() -> int:
    """Of the last level, as Linux tells it; elsewhere 32 MiB, a common size."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    found = re.fullmatch(r"(\d+)K", path.read_text().strip()) if path.exists() else None
    return int(found[1]) * 1024 if found else 32 * 2**20


def measure_peaks(device: torch.device, dtype: torch.dtype, *, samples: int) -> Peaks:
    """The chip's best at three plain tasks, on random data; read-only is the fastest of three reductions."""
    big = device.type == "cuda"
    side, stream_bytes = (8192, 2 * 2**30) if big else (1024, 128 * 2**20)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(stream_bytes // 4, device=device)
    target = torch.empty_like(source)

    def best_ms(call: Call) -> float:
        if big:
            from triton.testing import do_bench

            return float(do_bench(call, return_mode="min"))
        return 1e3 * min(timeit.repeat(call, timer=time.perf_counter, number=1, repeat=samples))

    product = torch.empty(side, side, dtype=dtype, device=device)
    reductions = (source.sum, functools.partial(torch.dot, source, source), source.amax)
    return Peaks(
        matmul_tflops=2 * side**3 / best_ms(lambda: torch.mm(left, right, out=product)) / 1e9,
        copy_gbs=2 * stream_bytes / best_ms(lambda: target.copy_(source)) / 1e6,
        stream_gbs=stream_bytes / min(best_ms(call) for call in reductions) / 1e6,
    )


def sm_clock(device: torch.device) -> list[float]:
    """MHz, by NVML (nvidia-ml-py); empty on a CPU and where nothing can read it."""
    if device.type != "cuda":
        return []
    try:
        return [float(torch.cuda.clock_rate(device))]
    except Exception:
        return []


def tensor_bytes(*things: Any) -> int:
    """Bytes of all distinct tensors in the given tensors, dataclasses, lists and tuples."""
    found: dict[tuple[int, torch.Size], int] = {}

    def look(thing: Any) -> None:
        if isinstance(thing, Tensor):
            found[thing.data_ptr(), thing.shape] = thing.numel() * thing.element_size()
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                look(item)
        elif dataclasses.is_dataclass(thing):
            look([getattr(thing, field.name) for field in dataclasses.fields(thing)])

    look(things)
    return sum(found.values())


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most bytes that `call` holds at one time beyond what was allocated before it; None where nothing can tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as record:
        call()
    try:
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    except AttributeError:  # the record is not public: another torch may keep it elsewhere
        return None
    return max(itertools.accumulate(change for _, change in changes), default=0)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Swallows what the profiler writes to file descriptor 2, which would tear the progress bar apart."""
    saved = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
