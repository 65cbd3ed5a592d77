"""A few processes in one gloo group, inside pytest: each test hands them a function and gets every rank's answer.

They are forked from a server that has imported the heavy packages once, so that a group costs a tenth of a second and not an
import per process. A collective that waits longer than TIMEOUT fails instead of hanging; a group in which anything failed is
replaced, because its ranks no longer agree.
"""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 15.0  # seconds, of one collective
_PATIENCE = 120.0  # seconds, of one test's function

_PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "memvp_kernels.models",
]


class Group:
    """`world` processes, started when first used.

    Args:
        world: how many.
        meet: in one group from the start; False: what they run sees to that, as under torchrun.
    """

    def __init__(self, world: int, *, meet: bool = True) -> None:
        self.world = world
        self.meet = meet
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; a module-level function, and arguments and results that pickle.

        Returns:
            Every rank's result.

        Raises:
            AssertionError: a rank failed; with its traceback, and those of the others that failed with it.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            answered = False
            try:
                answered = pipe.poll(_PATIENCE)
                answers.append(pipe.recv() if answered else (False, f"no answer in {_PATIENCE} s"))
            except EOFError:
                answers.append((False, f"the process ended with {self._processes[rank].exitcode}"))
        failures = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in enumerate(answers) if not ok]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        handle, meeting = tempfile.mkstemp()
        os.close(handle)
        Path(meeting).unlink()  # the store wants to make it
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world, meeting if self.meet else None), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def meet(port: int) -> None:
    """In a process of a group that accelerate is to introduce to each other, as if nothing had run in it before."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _serve(pipe: Connection, rank: int, world: int, meeting: str | None) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    if meeting is not None:
        patience = datetime.timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=patience)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:
            pipe.send((False, traceback.format_exc()))
