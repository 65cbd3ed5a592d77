"""One thread block: its partitions, its barriers and everything that happens behind its back, at the most inconvenient time.

The partitions of a warp-specialised kernel are threads of which one runs at a time. Each operation that another partition could
notice is a point where the scheduler may hand over. Asynchronous work is a queue; a `Schedule` says who runs and when work is done.
"""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.triton.gluon.device_memory import DeviceMemory
from tests.triton.gluon.races import Clock

__all__ = ["Barrier", "Deadlock", "Machine", "Partition", "ProtocolError", "Schedule", "current", "where"]

_HERE = str(Path(__file__).parent)


class ProtocolError(AssertionError):
    """An operation that the hardware or Triton forbids, or leaves undefined."""


class Deadlock(AssertionError):
    """Every partition waits and nothing is in flight."""


@dataclass(frozen=True)
class Schedule:
    """Who runs, and when what was begun is done.

    Args:
        order: "default first" or "workers first" let that partition run until it waits; "random" hands over anywhere.
        loads: a TMA load lands "late" (when every partition waits), "early" (at once) or at "random".
        reads: a wgmma and a TMA store read shared memory "late" (when they are waited for) or "early" (at once).
        races: raise at an access that nothing orders; without it only wrong numbers show one.
    """

    order: str = "default first"
    loads: str = "late"
    reads: str = "late"
    seed: int = 0
    races: bool = True

    def __str__(self) -> str:
        return f"{self.order}, loads {self.loads}, reads {self.reads}, seed {self.seed}"


class _Aborted(BaseException):
    """Another partition failed."""


@dataclass
class Partition:
    """One group of warps with one flow of control."""

    name: str
    index: int
    warps: int
    clock: Clock
    agent: int
    mma_agent: int
    store_agent: int
    mmas: list[Any] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)
    mma_count: int = 0
    store_count: int = 0
    waits_for: tuple[Barrier, int] | None = None
    waits_at: str = ""
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def ready(self) -> bool:
        return self.waits_for is None or self.waits_for[0].passed(self.waits_for[1])

    def tick(self) -> None:
        """What comes now is not known to whoever was told of this partition so far."""
        self.clock.times[self.agent] += 1


class Barrier:
    """An mbarrier: a phase is over when no arrival and no byte is outstanding, and the next begins."""

    def __init__(self, name: str, count: int, agent: int, by: Partition) -> None:
        self.name, self.count, self.agent = name, count, agent
        self.pending, self.bytes, self.phase = count, 0, 0
        self.unfenced: int | None = by.index
        self.known, self.released = Clock(), Clock()

    def __str__(self) -> str:
        return f"{self.name}: phase {self.phase}, {self.pending} of {self.count} arrivals and {self.bytes} bytes outstanding"

    def arrive(self, count: int, clock: Clock) -> None:
        if count > self.pending:
            raise ProtocolError(f"{count} more arrivals than the phase takes at {self}")
        self.pending -= count
        self.known.join(clock)
        self._turn()

    def land(self, count: int, clock: Clock, phase: int) -> None:
        self.bytes -= count
        self.known.join(clock)
        self.known[self.agent] = phase + 1
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.released = self.known.copy()

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is over; a fresh barrier says so of parity 1."""
        return self.phase & 1 != parity


@dataclass
class Load:
    """A TMA load on its way."""

    barrier: Barrier
    land: Callable[[], None]
    story: str


class Machine:
    """The state of one thread block while its program runs."""

    def __init__(
        self, schedule: Schedule, program: tuple[int, ...], grid: tuple[int, ...], warps: int,
        memory: DeviceMemory | None = None,
    ) -> None:  # fmt: skip
        """Args: memory: of the launch; by default of one of its own."""
        self.schedule, self.program, self.grid = schedule, program, grid
        self.memory = DeviceMemory() if memory is None else memory
        self.random = random.Random(f"{schedule.seed} {program}")
        self.agents = 0
        self.loads: list[Load] = []
        self.barriers: list[Barrier] = []
        self.allocations: list[Any] = []
        self.failure: BaseException | None = None
        self.running = self.root = self._partition("default", 0, warps)
        self.partitions = [self.root]

    def agent(self) -> int:
        self.agents += 1
        return self.agents

    def _partition(self, name: str, index: int, warps: int, parent: Clock | None = None) -> Partition:
        clock = Clock() if parent is None else parent.copy()
        out = Partition(name, index, warps, clock, self.agent(), self.agent(), self.agent())
        out.tick()
        return out

    def touch(self, tensor: Any, index: Any, write: bool, story: str) -> None:
        """Note an access to elements of a tensor in device memory."""
        if self.schedule.races:
            number = sum(i * math.prod(self.grid[:d]) for d, i in enumerate(self.program))
            self.memory.access(tensor, index, write, number, story)

    # Time

    def step(self) -> None:
        """Others may run, and work in flight may be done, before the next operation."""
        if self.schedule.loads == "random":
            while self.loads and self.random.random() < 0.3:
                self._land(self.random.choice(self.loads))
        if len(self.partitions) > 1:
            self._hand_over()

    def wait(self, barrier: Barrier, parity: int, at: str) -> None:
        """Return once the barrier has passed the phase of that parity."""
        me = self.running
        me.waits_for, me.waits_at = (barrier, parity), at
        self._hand_over()
        me.waits_for = None

    def begin(self, load: Load) -> None:
        self.loads.append(load)
        if self.schedule.loads == "early":
            self._land(load)

    def _land(self, load: Load) -> None:
        self.loads.remove(load)
        load.land()

    def _next(self) -> Partition:
        """Who runs now. Where nobody can, loads land until someone can, those that are waited for first."""
        while not (ready := [p for p in self.partitions if p.ready]):
            if not self.loads:
                raise Deadlock(self._table())
            waited = [p.waits_for[0] for p in self.partitions if p.waits_for is not None]
            self._land(self.random.choice([x for x in self.loads if x.barrier in waited] or self.loads))
        return self._chosen(ready)

    def _hand_over(self) -> None:
        self._give(self._next(), self.running)

    def _chosen(self, ready: Sequence[Partition]) -> Partition:
        if self.schedule.order == "random":
            return self.random.choice(list(ready))
        return ready[-1] if self.schedule.order == "workers first" else ready[0]

    def _give(self, chosen: Partition, me: Partition) -> None:
        if chosen is me:
            return
        self.running = chosen
        chosen.baton.release()
        self._take(me)

    def _take(self, me: Partition) -> None:
        me.baton.acquire()
        if self.failure is not None:
            raise _Aborted
        self.running = me

    def _table(self) -> str:
        lines = ["every partition waits and nothing is in flight"]
        for p in self.partitions:
            barrier, parity = p.waits_for or (None, 0)
            lines.append(f"  {p.name} waits at {p.waits_at} for phase {parity} of {barrier.name if barrier else '?'}")
        return "\n".join(lines + [f"  {b}" for b in self.barriers])

    # Partitions

    def specialise(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int]) -> Any:
        """Run all, return what the first returns."""
        if len(self.partitions) > 1:
            raise ProtocolError("warp_specialize within warp_specialize")
        root, results = self.root, {}
        workers = [
            self._partition(f"worker {i} ({fn.__name__})", i + 1, count, root.clock)
            for i, ((fn, _), count) in enumerate(zip(functions[1:], warps, strict=True))
        ]
        root.tick()
        root.name = f"default ({functions[0][0].__name__})"
        everyone = [root, *workers]
        self.partitions = list(everyone)
        done = threading.Semaphore(0)

        def body(me: Partition, fn: Callable[..., Any], arguments: Sequence[Any]) -> None:
            try:
                self._take(me)
                results[me.index] = fn(*arguments)
                if me is not root:
                    self.finish(me)
                self.partitions.remove(me)
                if self.partitions:
                    self._leave()
            except _Aborted:
                pass
            except BaseException as error:
                self._abort(error, everyone)
            finally:
                done.release()

        for me, (fn, arguments) in zip(everyone, functions, strict=True):
            threading.Thread(target=body, args=(me, fn, arguments), daemon=True).start()
        first = self._chosen(everyone)
        first.baton.release()
        for _ in everyone:
            done.acquire()
        self.partitions, self.running = [root], root
        if self.failure is not None:
            raise self.failure
        for worker in workers:
            root.clock.join(worker.clock)
        return results[0]

    def _leave(self) -> None:
        """The running partition is over; the others go on."""
        self.running = chosen = self._next()
        chosen.baton.release()

    def _abort(self, error: BaseException, everyone: Sequence[Partition]) -> None:
        if self.failure is None:
            self.failure = error
        for other in everyone:
            other.baton.release()

    def finish(self, partition: Partition) -> None:
        """The end of a partition's code."""
        for queue, what in ((partition.mmas, "wgmma"), (partition.stores, "TMA store")):
            if queue:
                raise ProtocolError(f"{partition.name} ends before it waited for its {what}: {queue[0].story}")

    def close(self) -> None:
        """The end of the program."""
        self.finish(self.root)
        if self.loads:
            raise ProtocolError(f"the program ends before this landed: {self.loads[0].story}")


_current: list[Machine] = []


def current() -> Machine:
    """The thread block that runs."""
    if not _current:
        raise RuntimeError("outside a Gluon kernel")
    return _current[-1]


def enter(machine: Machine) -> None:
    _current.append(machine)


def leave() -> None:
    _current.pop()


def where() -> str:
    """file:line of the kernel's code that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None and "__gluon_interpreted__" not in frame.f_globals:
        frame = frame.f_back
    if frame is None:
        return "the host"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
