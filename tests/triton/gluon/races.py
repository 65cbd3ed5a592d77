"""Which accesses to shared memory are ordered, in any schedule: vector clocks.

An agent is whatever acts in order: a partition, its queue of wgmmas, its queue of TMA stores, the TMA loads that complete on one
barrier. Each access is stamped (agent, time); a partition may touch bytes if it knows, through what it waited for, of every access
that conflicts. So a protocol error is found even where this schedule happened to give the right numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["PIECE_BYTES", "Clock", "Race", "Trace"]

PIECE_BYTES = 16  # what a swizzle moves as a whole
_AGENTS = 256


class Race(AssertionError):
    """Two accesses to the same bytes of shared memory, one of them a write, that nothing orders."""


class Clock:
    """How far each agent is known to have come."""

    def __init__(self, times: np.ndarray | None = None) -> None:
        self.times = np.zeros(_AGENTS, np.int32) if times is None else times

    def copy(self) -> Clock:
        return Clock(self.times.copy())

    def join(self, other: Clock) -> None:
        np.maximum(self.times, other.times, out=self.times)

    def __getitem__(self, agent: int) -> int:
        return int(self.times[agent])

    def __setitem__(self, agent: int, time: int) -> None:
        self.times[agent] = max(self.times[agent], time)


class Trace:
    """The accesses to one allocation, by pieces of 16 bytes."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        pieces = -(-size // PIECE_BYTES)
        self.writer, self.written = np.zeros(pieces, np.int16), np.zeros(pieces, np.int32)
        self.read: dict[int, np.ndarray] = {}
        self.stories: dict[tuple[int, int], str] = {}

    def access(self, pieces: Any, write: bool, known: Clock, agent: int, time: int, story: str) -> None:
        """An access by `agent` at its `time`, begun by someone who knows `known`; `pieces` indexes, `story` is for the message."""
        writer, written = self.writer[pieces], self.written[pieces]
        late = written > known.times[writer]
        if late.any():
            at = int(np.flatnonzero(late)[0])
            self._raise(story, "write", int(writer[at]), int(written[at]))
        if write:
            for reader, times in self.read.items():
                late = times[pieces] > known.times[reader]
                if late.any():
                    self._raise(story, "read", reader, int(times[pieces][np.flatnonzero(late)[0]]))
                times[pieces] = 0
            self.writer[pieces], self.written[pieces] = agent, time
        else:
            if agent not in self.read:
                self.read[agent] = np.zeros(len(self.writer), np.int32)
            self.read[agent][pieces] = time
        self.stories[agent, time] = story

    def _raise(self, story: str, what: str, agent: int, time: int) -> None:
        other = self.stories.get((agent, time), "an earlier access")
        raise Race(f"{story} touches {self.name} while nothing says that this {what} is over: {other}")
