"""Peak memory of one call: the allocator's own count on a GPU, the profiler's record of allocations on a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

__all__ = ["call_peak_bytes", "tensor_bytes"]


def call_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `call` holds at one time beyond what was allocated before it; None where nothing can tell.

    Operands that existed beforehand are not in it: a program adds those it knows of (:func:`tensor_bytes`).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    return _cpu_peak(call)


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the distinct tensors; one that is listed twice counts once."""
    distinct = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors if t is not None}
    return sum(distinct.values())


def _cpu_peak(call: Callable[[], object]) -> int | None:
    with (
        _quiet_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        result = call()
    del result
    try:
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    except AttributeError:  # the record is not public: another torch may keep it elsewhere
        return None
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Swallows what the profiler writes to file descriptor 2, which would tear the progress bar apart."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
