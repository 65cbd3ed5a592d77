"""What surrounds a CUDA graph, with a stand-in for the GPU: streams restored, failures tidied up, replays compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import graphs
from harness.graphs import Captured, DeviceLostError, NotCapturableError, WrongReplayError

GPU = torch.device("cuda", 0)


class Machine(SimpleNamespace):
    """As much of torch.cuda as a capture touches. `broken`: from the first failed capture on, every capture fails."""

    def __init__(self, *, broken: bool = False) -> None:
        super().__init__(current="main", mode=0, log=[], broken=broken, failed=False)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = SimpleNamespace(
            synchronize=lambda device=None: self.log.append("synchronize"),
            get_sync_debug_mode=lambda: self.mode,
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
            current_stream=lambda device=None: SimpleNamespace(name=self.current, wait_stream=lambda other: None),
            set_stream=lambda stream: setattr(self, "current", stream.name),
            stream=lambda stream: contextlib.nullcontext(),
            graph_pool_handle=lambda: (0, 1),
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            graph=self.graph,
            current_device=lambda: 0,
        )
        monkeypatch.setattr(graphs.torch, "cuda", fake)
        monkeypatch.setattr(
            graphs, "_Stream", lambda device: SimpleNamespace(name="side", wait_stream=lambda other: None)
        )
        monkeypatch.setattr(graphs.torch, "zeros", lambda *shape, device: torch.ones(*shape))
        monkeypatch.setattr(graphs.torch, "randn", lambda *shape, device: torch.ones(*shape))

    @contextlib.contextmanager
    def graph(self, graph: object, **options: object) -> Iterator[None]:
        """As torch's: an error at the end of a capture leaves the side stream current."""
        before, self.current = self.current, "side"
        try:
            yield
        except RuntimeError:
            self.failed = True
            raise RuntimeError("operation failed due to a previous error during capture\nmore") from None
        if self.broken and self.failed:
            raise RuntimeError("no capture works any more")
        self.failed, self.current = False, before


def unsafe(machine: Machine) -> Callable[[], object]:
    def call() -> object:
        if machine.current == "side":
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    return call


def test_a_failed_capture_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch)
    with pytest.raises(NotCapturableError, match=r"^operation not permitted when stream is capturing$"):
        graphs.capture([unsafe(machine)], 2, GPU)
    assert machine.current == "main"
    assert machine.mode == 0
    assert machine.log[-2:] == ["replay", "synchronize"]  # another capture was made to close what this one left open


def test_where_no_capture_works_any_more_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(broken=True)
    machine.install(monkeypatch)
    with pytest.raises(DeviceLostError, match="left the GPU unusable: operation not permitted"):
        graphs.capture([unsafe(machine)], 1, GPU)
    assert machine.current == "main"


def test_what_synchronises_is_not_even_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch)
    monkeypatch.setattr(machine, "graph", None)

    def call() -> None:
        if machine.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(NotCapturableError, match="synchronizing"):
        graphs.capture([call], 1, GPU)
    assert machine.mode == 0


def test_a_graph_holds_its_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.install(monkeypatch)
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) or torch.full((1,), float(i)) for i in range(2)]  # type: ignore[func-returns-value]
    captured = graphs.capture(calls, 4, GPU)
    assert seen[-4:] == [0, 1, 0, 1]
    assert captured.result.item() == 0.0  # type: ignore[attr-defined]
    captured.replay()
    assert machine.log[-1] == "replay"


def replaying(write: Callable[[torch.Tensor], Any]) -> Captured:
    result = {"y": torch.tensor([1.0, 2.0])}
    return Captured(lambda: write(result["y"]), result)


def test_a_replay_is_compared_with_the_call_itself() -> None:
    expected = [torch.tensor([1.0, 2.0])]
    graphs.check_replay(replaying(lambda y: y.copy_(expected[0])), expected, 0.0)
    graphs.check_replay(replaying(lambda y: y.copy_(expected[0] * 1.001)), expected, 0.01)
    with pytest.raises(WrongReplayError, match=r"0\.5 off its own result"):
        graphs.check_replay(replaying(lambda y: y.copy_(expected[0] * 1.5)), expected, 0.01)


def test_an_element_that_a_replay_does_not_write_is_noticed() -> None:
    expected = [torch.tensor([1.0, 2.0])]
    with pytest.raises(WrongReplayError):
        graphs.check_replay(replaying(lambda y: y[:1].copy_(expected[0][:1])), expected, 10.0)


def test_tensors_of_whatever_a_call_returns() -> None:
    a, b = torch.ones(1), torch.ones(2)
    assert graphs.tensors_of({"a": a, "more": [b, None]}) == [a, b]
    assert graphs.tensors_of(a) == [a]
    assert graphs.tensors_of(None) == []
