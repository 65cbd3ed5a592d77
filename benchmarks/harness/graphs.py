"""Calls captured into a CUDA graph, without a failed capture costing the process, and replays that still compute what they did.

A capture that fails leaves the side stream current, the allocator recording and the random generator capturing. So calls are first
run once more with every synchronisation an error, which finds most of what can't be captured; what fails all the same is tidied up
after, and where that fails, too, the device counts as lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.correctness import relative_error

__all__ = [
    "Captured",
    "DeviceLostError",
    "NotCapturableError",
    "WrongReplayError",
    "capture",
    "check_replay",
    "tensors_of",
]

_Stream: Any = torch.cuda.Stream  # untyped in torch


class NotCapturableError(RuntimeError):
    """The calls can't be captured; the device is as it was."""


class WrongReplayError(RuntimeError):
    """The graph's replay does not give what the calls gave."""


class DeviceLostError(RuntimeError):
    """Nothing more runs in this process."""


@dataclass(frozen=True)
class Captured:
    """A graph of calls.

    Attributes:
        replay: runs them.
        result: what the first of them returned; a replay writes its tensors anew.
    """

    replay: Callable[[], object]
    result: object


def capture(calls: Sequence[Callable[[], object]], repeat: int, device: torch.device) -> Captured:
    """`repeat` calls, taken in turn, as one graph.

    Args:
        calls: warmed up.
        repeat: how many calls the graph holds.
        device: a GPU.

    Raises:
        NotCapturableError: a call synchronises, or does something else that a graph can't hold.
        DeviceLostError: a failed capture left the process unusable.
    """
    _refuse_synchronisation(calls, device)
    current = torch.cuda.current_stream(device)
    side = _Stream(device)
    pool = torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    results: list[object] = []
    try:
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate their workspaces for the capturing stream beforehand
            for call in calls:
                call()
        current.wait_stream(side)
        with torch.cuda.graph(graph, pool=pool, stream=side):
            for turn in range(repeat):
                result = calls[turn % len(calls)]()
                results = results or [result]
    except RuntimeError as error:
        torch.cuda.set_stream(current)
        del graph
        _tidy_up(device, pool)
        raise NotCapturableError(_reason(error)) from error
    finally:
        torch.cuda.set_stream(current)
    return Captured(graph.replay, results[0])


def check_replay(captured: Captured, expected: Sequence[Tensor], allowed: float) -> None:
    """Replays once over poisoned results.

    Args:
        captured: the graph.
        expected: the tensors that its first call gave outside of it, copied.
        allowed: relative error.

    Raises:
        WrongReplayError: an element was not written, or differs by more.
    """
    results = tensors_of(captured.result)
    with torch.no_grad():
        for tensor in results:
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)
    captured.replay()
    errors = [relative_error(tensor, exact) for tensor, exact in zip(results, expected, strict=True)]
    if any(error > allowed for error in errors):
        raise WrongReplayError(
            f"replayed from a CUDA graph it is {max(errors):.3g} off its own result, allowed {allowed:.3g}"
        )


def tensors_of(result: object) -> list[Tensor]:
    """The tensors of what a call returned: one, or a dictionary or list of them."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in tensors_of(value)]
    if isinstance(result, (list, tuple)):
        return [tensor for value in result for tensor in tensors_of(value)]
    return []


def _refuse_synchronisation(calls: Sequence[Callable[[], object]], device: torch.device) -> None:
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    except RuntimeError as error:
        raise NotCapturableError(_reason(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize(device)


def _tidy_up(device: torch.device, pool: tuple[int, int]) -> None:
    """After a failed capture: the allocator stops recording, and a capture that succeeds ends what the other left open."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError, AttributeError):  # already over, or another torch
        torch._C._cuda_endAllocateToPool(index, pool)
    try:
        torch.cuda.synchronize(device)
        number = torch.zeros(1, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            number.add_(1)
        graph.replay()
        torch.randn(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(f"a failed CUDA graph capture left the GPU unusable: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: ending a failed capture raises once more, and says less."""
    while error.__context__ is not None and isinstance(error.__context__, RuntimeError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
