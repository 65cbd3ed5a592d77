"""What the benchmark programs do around their cases: environment, roofs, progress, time limit, rows as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from harness.cli import Setting
from harness.environment import environment
from harness.inputs import source
from harness.measure import BrokenDeviceError, Candidate, measure
from harness.parts import AGAIN
from harness.progress import Progress
from harness.results import Results, Row
from harness.rooflines import Roofs
from harness.roofs import measure_roofs
from harness.stages import STAGES, anchor, groups
from harness.timer import Timer

__all__ = ["Job", "run"]


@dataclass(frozen=True)
class Job:
    """One case of a program.

    Attributes:
        template: the fields that all its rows have.
        candidates: () → its variants; not called before its turn.
        host: host time per call is of interest.
        gradients: False: all of it runs under torch.no_grad.
    """

    template: Row
    candidates: Callable[[], Sequence[Candidate]]
    host: bool = False
    gradients: bool = True


def run(program: str, setting: Setting, jobs: Sequence[Job]) -> tuple[Results, list[str]]:
    """Measures the jobs, the essential variants of all of them before the rest, saving after every group of variants.

    Returns:
        The results, and the cases that `--seconds` left no time for, in whole or in part.

    Raises:
        SystemExit: AGAIN, after a variant that left the GPU unusable; its row and all before it are saved.
    """
    begun = time.monotonic()
    torch.manual_seed(0)
    results = _results(program, setting)
    timer = Timer(setting.device, samples=setting.samples)
    with Progress(1 + STAGES * len(jobs), quiet=setting.quiet) as progress:
        if "roofs" not in results.environment:
            progress.show("roofs of this machine")
            results.environment["roofs"] = vars(measure_roofs(setting.device, setting.dtype, samples=setting.samples))
        progress.step()
        running = _Running(setting, results, timer, begun, progress)
        for stage in range(STAGES):
            for job in jobs:
                with contextlib.nullcontext() if job.gradients else torch.no_grad():
                    running.measure(job, stage)
                progress.step()
    return results, running.left_out


@dataclass
class _Running:
    """A run on its way.

    Attributes:
        setting, results, timer, progress: of the run.
        begun: when.
        left_out: cases, and the variants that they lack, for want of time.
        absent: cases that an optional package is missing for.
        stages: by case, those in which one of its variants has its turn.
    """

    setting: Setting
    results: Results
    timer: Timer
    begun: float
    progress: Progress
    left_out: list[str] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    stages: dict[str, set[int]] = field(default_factory=dict)

    def late(self) -> bool:
        """Whether `--seconds` are over."""
        return self.setting.seconds is not None and time.monotonic() - self.begun > self.setting.seconds

    def measure(self, job: Job, stage: int) -> None:
        """The variants of one case that have their turn in this stage and no row yet."""
        case = job.template.case
        if case in self.absent or case in self.left_out or stage not in self.stages.get(case, range(STAGES)):
            return
        if self.late():
            whole = not any(row.case == case for row in self.results.rows)
            self.left_out.append(case if whole else f"{case}: some variants")
            return
        self.progress.show(case)
        try:
            candidates = self._unbroken(job)
        except ImportError as error:  # an optional package: its cases are left out, the others run
            self.absent.add(case)
            if stage == 0:
                row = dataclasses.replace(job.template, variant="all")
                row.leave_out("skipped", str(error))
                self.results.add([row])
            return
        self.stages[case] = {n for n in range(STAGES) if groups(n, candidates, self.setting.device)}
        for group in groups(stage, candidates, self.setting.device):
            self._group(job, candidates, group)
            if self.setting.compiled:
                # Each case compiles for its own shapes; past its limit of shapes dynamo would quietly run the eager form.
                torch._dynamo.reset()

    def _group(self, job: Job, candidates: Sequence[Candidate], group: list[Candidate]) -> None:
        own = {row.variant: row for row in self.results.rows if row.case == job.template.case}
        wanted = [candidate for candidate in group if candidate.name not in own]
        if not wanted:
            return
        if self.late():
            self.left_out.append(f"{job.template.case}: {', '.join(candidate.name for candidate in wanted)}")
            return
        ours = anchor(candidates, {name for name, row in own.items() if row.status == "ok"})
        together = [ours, *wanted] if ours is not None else wanted
        try:
            rows = measure(
                job.template,
                together,
                timer=self.timer,
                roofs=Roofs(**self.results.environment["roofs"]),
                host=job.host,
                late=self.late,
            )
        except BrokenDeviceError as error:
            self._stop(job, [row for row in error.rows if row.variant not in own], error)
        beside = next((row.median_ms for row in rows if ours is not None and row.variant == ours.name), None)
        rows = [row for row in rows if row.variant not in own]
        for row in rows:
            row.beside_ms = beside if row.status == "ok" else None
        missing = {candidate.name for candidate in wanted} - {row.variant for row in rows}
        if missing:
            self.left_out.append(f"{job.template.case}: {', '.join(sorted(missing))}")
        self._save(rows)

    def _unbroken(self, job: Job) -> list[Candidate]:
        """The case's variants; those that broke the GPU before are not tried again."""
        broken = self.results.environment.get("broken", {})
        found = list(job.candidates())
        for candidate in found:
            if candidate.name in broken:
                candidate.missing = f"left out: it left the GPU unusable in {broken[candidate.name]!r}"
        return found

    def _save(self, rows: list[Row]) -> None:
        clocks = self.timer.clocks.summary()
        if clocks:
            self.results.environment["clocks"] = clocks
        self.results.add(rows)

    def _stop(self, job: Job, rows: list[Row], error: BrokenDeviceError) -> NoReturn:
        self.results.environment.setdefault("broken", {})[error.variant] = job.template.case
        self._save(rows)
        print(
            f"{job.template.case}: {error} ({error.__cause__}); {len(self.results.rows)} rows are saved, run again with "
            "--continue for the rest",
            file=sys.stderr,
            flush=True,
        )
        if self.setting.device.type == "cuda":
            sys.stdout.flush()
            os._exit(AGAIN)  # tearing down what was on that GPU may abort, and then the status would be another
        raise SystemExit(AGAIN) from error


def _results(program: str, setting: Setting) -> Results:
    found = environment(setting.device, program)
    if setting.go_on and setting.json is not None and setting.json.exists():
        return Results.go_on(found, setting.json)
    results = Results(found, setting.json)
    results.environment["inputs"] = source()
    return results
