"""Everything that a GPU machine without network should do, in one run of under nine minutes, the most valuable first.

    python benchmarks/gpu_report.py                       # or: make gpu-report
    python benchmarks/gpu_report.py --only build tests    # some parts
    python benchmarks/gpu_report.py --out DIR             # rows in DIR/<gpu>/, log and summary in DIR; then copy DIR/<gpu>
    python benchmarks/gpu_report.py --commit "$(git describe --always --dirty --abbrev=40)"     # said where the tree has git

Every part is a process of its own with a time limit of its own, and gets what earlier parts did not use; what a part left behind when
its time was up is kept, and the next begins. Rows name their commit, so a copy of the tree without git needs --commit (or the
environment variable MEMVP_COMMIT). Nothing is installed: parts whose packages are missing say so. Plots and REPORT.md come from
`python benchmarks/report.py`, here or elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from harness.commit import DIRTY, commit_for_the_record
from harness.parts import AGAIN, RECORDING, Part, parts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
#: Seconds between asking a process to stop, so that it can say where it was, and killing it.
GRACE = 5.0
#: A part may take this many times its own seconds, where earlier parts left so much.
STRETCH = 2

Line = dict[str, Any]


def run_part(part: Part, results: Path, log: Path, *, seconds: int) -> Line:
    """Runs one part; what it prints goes to the log as it comes.

    Args:
        part: what.
        results: folder for its rows.
        log: to add to.
        seconds: after which it is stopped.

    Returns:
        Its line of the summary.
    """
    why_not = part.needs()
    if why_not is not None:
        return {"part": part.name, "status": "skipped", "reason": why_not, "seconds": 0.0}
    begun = time.monotonic()
    with log.open("a") as output:
        output.write(f"\n===== {part.name} =====\n")
        output.flush()
        place = output.tell()
        status = _run(part.command(results, seconds), part, output, seconds)
        while status == f"exit status {AGAIN}" and (left := int(seconds - (time.monotonic() - begun))) > 10:
            status = _run([*part.command(results, left), "--continue"], part, output, left)
    line = {"part": part.name, "status": status, "seconds": round(time.monotonic() - begun, 1)}
    if status.startswith("exit status"):
        said = log.read_bytes()[place:].decode(errors="replace")
        found = next((text for text in part.skipped_by if text in said), None)
        if found is not None:
            line |= {"status": "skipped", "reason": found}
    return line


def _run(command: list[str], part: Part, output: Any, seconds: int) -> str:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.variables}
    # A session of its own, so that stopping it stops the compilers and workers that it started.
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"stopped after {seconds} s"
    except BaseException:  # this run itself is being stopped
        _stop(process)
        raise
    return "ok" if code == 0 else f"exit status {code}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupts a part, so that pytest still tells its failures and Python where it was; then kills what is left."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results_folder(out: Path | None, device: str) -> Path:
    """<out or benchmarks/results>/<gpu>. torch is imported in a process of its own: it would hold a GPU context."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from harness.environment import device_name, slug\n"
        "print(slug(device_name(torch.device(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, str(HERE), device]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=variables)
    if found.returncode != 0:
        sys.exit(f"no {device} device to measure: {found.stderr.strip().splitlines()[-1]}")
    return (out or HERE / "results") / found.stdout.strip().splitlines()[-1]


def _parser() -> argparse.ArgumentParser:
    names = [part.name for part in parts("cuda")]
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, help="these parts alone")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the log, the summary and <gpu>/ (default: out/, and benchmarks/results/<gpu>/)",
    )
    parser.add_argument("--commit", help="what the tree is a copy of, where it has no git (default: $MEMVP_COMMIT)")
    parser.add_argument("--total", type=int, default=530, help="seconds for the whole run (default: 530)")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal with the smallest sizes"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts; the exit status is 1 when one of them failed or was stopped."""
    begun = time.monotonic()
    options = _parser().parse_args(arguments)
    chosen = [part for part in parts(options.device) if not options.only or part.name in options.only]
    commit = ""
    if any(part.name in RECORDING for part in chosen):
        try:
            commit = commit_for_the_record(options.commit)
        except ValueError as error:
            sys.exit(str(error))
    out = None if options.out is None else options.out.resolve()  # the parts run in the repository's root
    results = results_folder(out, options.device)
    notes = out or ROOT / "out"
    for folder in (results, notes):
        folder.mkdir(parents=True, exist_ok=True)
    log = notes / "gpu-report.log"
    log.unlink(missing_ok=True)
    summary = _Summary(notes / "gpu-report-summary.json")
    print(f"commit {commit or 'of no account: nothing is recorded'}{_dirty(commit)}", flush=True)
    previous = signal.signal(signal.SIGTERM, _cut)
    # A shell that runs this in the background ignores SIGINT, and what is ignored here is ignored in every part.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    unspent = 0.0
    try:
        for part in chosen:
            left = options.total - (time.monotonic() - begun)
            seconds = int(min(STRETCH * part.seconds, part.seconds + unspent, left))
            if seconds < 5:
                line: Line = {"part": part.name, "status": "skipped", "reason": "the run's time is up", "seconds": 0.0}
            else:
                summary.begin(part.name)
                line = run_part(part, results, log, seconds=seconds)
            unspent = max(0.0, unspent + part.seconds - line["seconds"])
            summary.add(line)
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGINT, interrupt)
        _last_lines(log)
        print(f"\nrows: {results}{_dirty(commit)}\nlog: {log}\nnow: python benchmarks/report.py", flush=True)
        summary.show()
    return int(any(line["status"] not in ("ok", "skipped") for line in summary.lines))


class _Summary:
    """What became of every part, in a file after every one, so that a run that is cut still says how far it came."""

    def __init__(self, path: Path) -> None:
        self.lines: list[Line] = []
        self._path = path

    def begin(self, name: str) -> None:
        self._write([*self.lines, {"part": name, "status": "begun, and then the run was cut", "seconds": 0.0}])

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self._write(self.lines)
        print(_said(line), flush=True)

    def show(self) -> None:
        """All lines once more: where only the end of the output is kept, it is these."""
        print("\n".join(["", *(_said(line) for line in self.lines)]), flush=True)

    def _write(self, lines: list[Line]) -> None:
        self._path.write_text(json.dumps(lines, indent=1) + "\n")


def _said(line: Line) -> str:
    return f"{line['part']:12} {line['status']} {line.get('reason', '')} ({line['seconds']} s)"


def _dirty(commit: str) -> str:
    return (
        "\nUNCOMMITTED CHANGES: these rows name a commit that is not what was measured"
        if commit.endswith(DIRTY)
        else ""
    )


def _cut(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _last_lines(log: Path, *, lines: int = 15) -> None:
    """The end of every part's output, for whoever sees only the terminal."""
    if not log.exists():
        return
    for block in log.read_text(errors="replace").split("\n===== ")[1:]:
        print("\n===== " + "\n".join([block.splitlines()[0], *block.splitlines()[1:][-lines:]]))


if __name__ == "__main__":
    sys.exit(main())
