"""All that a GPU machine without network should run, in one command of nine minutes at most, the most valuable first.

    python3 tools/gpu_report.py --commit HASH --out FOLDER          everything, into at most 8 files under FOLDER

Every part is a process of its own with a time limit, and may use what earlier ones left over; what it wrote in its time is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
TOTAL, GRACE = 540, 5  # seconds; the second between asking a part to stop, so that it says where it was, and killing it
AGAIN = 75  # a benchmark's exit status where a variant broke the GPU: --continue measures the rest in a new process
TARGETS = {"8.0": "80", "8.6": "80", "8.9": "80", "9.0": "90a", "10.0": "100a", "12.0": "120"}
OUR_KERNELS = ("_fwd_kernel", "_bwd_kernel", "_memory_kernel", "_splits_kernel", "memvp")  # patching all takes minutes
PYTEST = "-m pytest -q -p no:cacheprovider --continue-on-collection-errors --maxfail=20 --tb=short -rfE"


@dataclass(frozen=True)
class Part:
    """One process: its limit, its command after "python3", the packages and programs it needs, what its environment has more."""

    name: str
    seconds: int
    command: str
    needs: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


def parts(out: Path, *, rehearse: bool) -> list[Part]:
    """The whole run in order; its limits add up to `TOTAL` at most."""

    def tests(name: str, seconds: int, what: str, workers: int = 1) -> Part:
        options = "--collect-only" if rehearse else "-m 'gpu and not slow' -o faulthandler_timeout=40"
        options += f" -n {workers}" if workers > 1 and importlib.util.find_spec("xdist") else ""
        built = {"MEMVP_TEST_INSTALLED": "1"}  # by the first part, and not again by the tests
        return Part(name, seconds, f"{PYTEST} {options} {what}", ("pytest",), built)

    def benchmark(name: str, seconds: int, sizes: str = "") -> Part:
        asked = "--device cpu --quick" if rehearse else f"--device cuda --preset llama-7b {sizes}"
        files = f"--json {shlex.quote(str(out / name))}.json --plot none"
        return Part(name, seconds, f"benchmarks/{name}.py {asked} {files} --quiet --seconds {seconds - 10}")

    names = " ".join(f"--kernel-name kns={name}" for name in OUR_KERNELS)
    sanitizer = f"{_find('compute-sanitizer')} --tool memcheck --error-exitcode 9 --report-api-errors no {names}"
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an overrun inside one of the cache's large blocks stays unseen
    return [
        Part("build", 40, "setup.py -q build_ext --inplace", ("setuptools", "pybind11", "nvcc"), _target()),
        Part("diagnosis", 15, "-m memvp_kernels"),
        Part("smoke", 25, "-m tools.smoke", variables={"TRITON_INTERPRET": "1"} if rehearse else {}),
        tests("tests-llama", 60, "tests/triton/test_gpu.py"),
        benchmark("decode", 50),
        benchmark("latency", 60, "--visual-tokens 256 --text-length 64 --batch 16 1"),
        benchmark("training", 60, "--visual-tokens 256 --text-length 64 --batch 16"),
        benchmark("kernels", 50, "--visual-tokens 256 --text-length 512 --batch 16"),
        tests("tests-cuda", 55, "tests/csrc tests/cuda --ignore=tests/csrc/test_gemm_gpu.py", workers=4),
        tests("tests-triton", 45, "tests/triton --ignore=tests/triton/test_gpu.py", workers=12),
        tests("tests-hopper", 45, "tests/csrc/test_gemm_gpu.py"),
        Part("memcheck", 30, f"{sanitizer} {sys.executable} -m tools.smoke calls", ("compute-sanitizer",), uncached),
    ]


def _target() -> dict[str, str]:
    """What setup.py compiles for: this GPU alone where its kind is known, because minutes count."""
    smi = "nvidia-smi --query-gpu=compute_cap --format=csv,noheader"
    found = subprocess.run(smi, shell=True, capture_output=True, text=True).stdout.partition("\n")[0]
    return {"MEMVP_CUDA": "require", "MEMVP_CUDA_ARCHS": TARGETS.get(found.strip(), "")}


def _find(program: str) -> str:
    """On PATH or in the CUDA toolkit; "" where it is not."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin") or ""


def run(part: Part, log: IO[str], seconds: float) -> str:
    """Runs a part, its output added to the log; returns what became of it."""
    if lacking := [name for name in part.needs if not (_find(name) or importlib.util.find_spec(name))]:
        return f"skipped, not here: {', '.join(lacking)}"
    print(f"\n===== {part.name} =====", file=log, flush=True)
    program = ([] if part.command.startswith("/") else [sys.executable]) + shlex.split(part.command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **part.variables}
    end, status = time.monotonic() + seconds, AGAIN
    while status == AGAIN and time.monotonic() < end - GRACE:
        # A session of its own, so that stopping it stops the compilers and workers that it started.
        process = subprocess.Popen(program, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(timeout=end - time.monotonic())
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
            return f"STOPPED after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        program = [*program, "--continue"]
    return "ok" if status == 0 else f"FAILED with exit status {status}"


def main() -> int:
    begun, spare, summary = time.monotonic(), 0.0, []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is stopped, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so would every part
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu-report"), help="folder of the rows, log and summary")
    add("--commit", help="what the tree is a copy of, where it has no git; every row names it")
    add("--only", nargs="+", metavar="PART", help="these parts alone")
    add("--cache", type=Path, help="kernels compiled elsewhere (python -m memvp_kernels warmup --archive)")
    add("--rehearse", action="store_true", help="on a CPU, with the smallest sizes; tests are collected")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update({"MEMVP_COMMIT": options.commit} if options.commit else {})
    with (out / "log.txt").open("w") as log:
        unpack = Part("cache", 10, f"-m memvp_kernels warmup --unpack {shlex.quote(str(options.cache))}")
        for part in [unpack] * bool(options.cache) + parts(out, rehearse=options.rehearse):
            if options.only and part.name not in options.only:
                continue
            start = time.monotonic()
            limit = min(2 * part.seconds, part.seconds + spare, TOTAL - GRACE - (start - begun))
            status = run(part, log, limit) if limit > GRACE else "skipped, the time is up"
            took = time.monotonic() - start
            spare = max(0.0, spare + part.seconds - took)
            summary.append(f"{part.name:14}{status} ({took:.0f} s)")
            print(summary[-1], flush=True)
            (out / "summary.txt").write_text("\n".join(summary) + "\n")
    for text in (out / "log.txt").read_text(errors="replace").split("\n===== ")[1:]:
        print("\n".join(["", text.splitlines()[0], *text.splitlines()[1:][-6:]]))
    print("", *summary, sep="\n")
    return int(any("FAILED" in line or "STOPPED" in line for line in summary))


if __name__ == "__main__":
    sys.exit(main())
