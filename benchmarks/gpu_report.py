"""Everything that a GPU machine without network should do, in one run of under nine minutes, the most valuable first.

    python benchmarks/gpu_report.py                       # or: make gpu-report
    python benchmarks/gpu_report.py --only build tests    # some parts
    python benchmarks/gpu_report.py --out DIR             # everything it writes in one folder, instead of benchmarks/results/

Every part is a process of its own with a time limit of its own; what a part left behind when its time was up is kept, and
the next begins. Nothing is installed: parts whose packages are missing say so. Plots and REPORT.md come from `python
benchmarks/report.py`, here or elsewhere.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Part:
    """One step of the run.

    Attributes:
        name: on the command line and in the summary.
        seconds: after which it is stopped.
        command: (results folder, seconds) → arguments.
        needs: () → why it can't run here, or None.
        variables: added to its environment.
    """

    name: str
    seconds: int
    command: Callable[[Path, int], list[str]]
    needs: Callable[[], str | None] = lambda: None
    variables: dict[str, str] = field(default_factory=dict)


def parts(device: str) -> list[Part]:
    """The whole run, in order; together under nine minutes.

    Args:
        device: "cuda"; "cpu" rehearses the run with the smallest sizes.
    """
    small = [] if device == "cuda" else ["--quick"]
    seven_b = ["--preset", "llama-7b", "--visual-tokens", "256"] if device == "cuda" else []

    def program(name: str, *options: str) -> Callable[[Path, int], list[str]]:
        def command(results: Path, seconds: int) -> list[str]:
            # The program begins no case that it may not finish.
            limit = ["--seconds", str(int(seconds * 0.7))]
            files = ["--json", str(results / f"{name}.json"), "--plot", "none", "--quiet"]
            return [sys.executable, str(HERE / f"{name}.py"), "--device", device, *small, *options, *limit, *files]

        return command

    def tests(_results: Path, _seconds: int) -> list[str]:
        # A file whose optional packages are missing must not keep the others from running.
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--maxfail=20"]
        return [sys.executable, "-m", "pytest", "-m", "gpu and not slow", *options, "tests"]

    def sanitizer(_results: Path, _seconds: int) -> list[str]:
        run = [_find("compute-sanitizer") or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        return [*run, sys.executable, str(HERE / "sanitized.py"), "--device", device]

    def diagnosis(_results: Path, _seconds: int) -> list[str]:
        return [sys.executable, "-m", "memvp_kernels"]

    def build(_results: Path, _seconds: int) -> list[str]:
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]

    build_needs = functools.partial(_lacks, "setuptools", "pybind11", programs=("nvcc",))
    return [
        Part("build", 90, build, build_needs, {"MEMVP_CUDA": "require", **_architecture()}),
        Part("diagnosis", 20, diagnosis),
        Part("tests", 105, tests, functools.partial(_lacks, "pytest")),
        Part("sanitizer", 55, sanitizer, functools.partial(_lacks, programs=("compute-sanitizer",))),
        Part("decode", 45, program("decode")),
        Part("kernels", 70, program("kernels", *seven_b)),
        Part("latency", 85, program("latency", *seven_b, *_sizes(device, "16", "1", "64"))),
        Part("training", 60, program("training", *seven_b, *_sizes(device, "16", "4"))),
    ]


def _architecture() -> dict[str, str]:
    """What setup.py should compile for: this GPU alone, because minutes count here; all of its targets where that is unclear."""
    targets = {"8.0": "80", "8.6": "80", "8.9": "80", "9.0": "90a", "10.0": "100a"}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    target = targets.get(found[0]) if found else None
    return {} if target is None else {"MEMVP_CUDA_ARCHS": target}


def _sizes(device: str, *batch: str) -> list[str]:
    return ["--batch", *batch, "--text-length", "64"] if device == "cuda" else []


def _find(program: str) -> str | None:
    """On PATH, or in the CUDA toolkit."""
    return shutil.which(program) or shutil.which(program, path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")


def _lacks(*packages: str, programs: tuple[str, ...] = ()) -> str | None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    missing += [program for program in programs if _find(program) is None]
    return f"not here: {', '.join(missing)}" if missing else None


def run_part(part: Part, results: Path, log: Path, *, seconds: int) -> dict[str, object]:
    """Runs one part; what it prints goes to the log as it comes, and its last lines to the terminal.

    Returns:
        Its line of the summary.
    """
    why_not = part.needs()
    if why_not is not None:
        return {"part": part.name, "status": "skipped", "reason": why_not, "seconds": 0.0}
    begun = time.monotonic()
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.variables}
    with log.open("a") as output:
        output.write(f"\n===== {part.name} =====\n")
        output.flush()
        # A session of its own, so that stopping it stops the compilers and workers that it started.
        process = subprocess.Popen(
            part.command(results, seconds),
            cwd=ROOT,
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {seconds} s"
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - begun, 1)}


def _results_folder(out: Path | None, device: str) -> Path:
    """benchmarks/results/<gpu>, or the folder asked for. torch is imported in a process of its own: it would hold a GPU context."""
    if out is not None:
        return out
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
    return HERE / "results" / found.stdout.strip().splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts; the exit status is 1 when one of them failed or was stopped."""
    names = [part.name for part in parts("cuda")]
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, help="these parts alone")
    parser.add_argument(
        "--out", type=Path, help="folder for rows, log and summary (default: benchmarks/results/<gpu>, log in out/)"
    )
    parser.add_argument("--total", type=int, default=530, help="seconds for the whole run")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal with the smallest sizes"
    )
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    results = _results_folder(options.out, options.device)
    notes = options.out or ROOT / "out"
    for folder in (results, notes):
        folder.mkdir(parents=True, exist_ok=True)
    log = notes / "gpu-report.log"
    log.unlink(missing_ok=True)
    summary: list[dict[str, object]] = []
    for part in parts(options.device):
        if options.only and part.name not in options.only:
            continue
        left = int(options.total - (time.monotonic() - begun))
        if left < 5:
            line: dict[str, object] = {
                "part": part.name,
                "status": "skipped",
                "reason": "the run's time is up",
                "seconds": 0.0,
            }
        else:
            line = run_part(part, results, log, seconds=min(part.seconds, left))
        summary.append(line)
        print(f"{part.name:10} {line['status']} {line.get('reason', '')} ({line['seconds']} s)", flush=True)
        # After every part, so that a run that is cut still says how far it came.
        (notes / "gpu-report-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nrows: {results}\nlog: {log}\nnow: python benchmarks/report.py")
    _last_lines(log)
    return int(any(line["status"] not in ("ok", "skipped") for line in summary))


def _last_lines(log: Path, *, lines: int = 15) -> None:
    """The end of every part's output, for whoever sees only the terminal."""
    if not log.exists():
        return
    for block in log.read_text(errors="replace").split("\n===== ")[1:]:
        print("\n===== " + "\n".join([block.splitlines()[0], *block.splitlines()[1:][-lines:]]))


if __name__ == "__main__":
    sys.exit(main())
