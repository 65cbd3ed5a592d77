"""What latency.py, training.py and kernels.py do around their cases: environment, roofs, progress, time limit, rows as they come."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harness.cli import Setting
from harness.clocks import ClockLog
from harness.environment import environment
from harness.inputs import source
from harness.measure import Candidate, measure
from harness.progress import Progress
from harness.results import Results, Row
from harness.roofs import measure_roofs
from harness.timer import Timer

__all__ = ["Job", "run"]


@dataclass(frozen=True)
class Job:
    """One case of a program.

    Attributes:
        template: the fields that all its rows have.
        candidates: () → its variants; not called before its turn.
        host: host time per call is of interest.
    """

    template: Row
    candidates: Callable[[], Sequence[Candidate]]
    host: bool = False


def run(program: str, setting: Setting, jobs: Sequence[Job]) -> tuple[Results, int]:
    """Measures the jobs in order, saving after each.

    Returns:
        The results, and how many jobs `--seconds` left no time for.
    """
    begun = time.monotonic()
    torch.manual_seed(0)
    results = Results(environment(setting.device, program), setting.json)
    results.environment["inputs"] = source()
    timer = Timer(setting.device, samples=setting.samples)
    left_out = 0
    with ClockLog(setting.device) as clocks, Progress(len(jobs) + 1, quiet=setting.quiet) as progress:
        progress.show("roofs of this machine")
        roofs = measure_roofs(setting.device, setting.dtype, samples=setting.samples)
        results.environment["roofs"] = vars(roofs)
        progress.step()
        for job in jobs:
            if setting.seconds is not None and time.monotonic() - begun > setting.seconds:
                left_out += 1
                continue
            progress.show(job.template.case)
            try:
                rows = measure(job.template, job.candidates(), timer=timer, roofs=roofs, host=job.host)
            except ImportError as error:  # an optional package: its cases are left out, the others run
                row = dataclasses.replace(job.template, variant="all")
                row.leave_out("skipped", str(error))
                rows = [row]
            results.environment["clocks"] = clocks.summary()
            results.add(rows)
            if setting.compiled:
                # Each case compiles for its own shapes; past its limit of shapes dynamo would quietly run the eager form.
                torch._dynamo.reset()
            progress.step()
    return results, left_out
