"""The parts of a GPU machine's run: what each runs, for how long, and what it needs. Imports nothing but Python's own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["AGAIN", "RECORDING", "RING_TESTS", "Part", "parts"]

#: Exit status of a program that a variant left without a GPU: its rows are saved, and started again with --continue, in a new
#: process, it measures the rest.
AGAIN = 75

_BENCHMARKS = Path(__file__).resolve().parents[1]

#: The parts that write rows, and so need a commit.
RECORDING = ("decode", "latency", "training", "kernels", "rings", "sweep", "quantized")

#: Substrings of our kernels' names; PyTorch's own are left out: patching all of them takes minutes.
_OUR_KERNELS = (
    "_fwd_kernel",
    "_bwd_kernel",
    "materialise_memory_kernel",
    "activation_fwd_kernel",
    "activation_bwd_kernel",
    "reduce_splits_kernel",
    "memvp",
)


#: Variants whose kernels have barriers of their own between their warps, measured where they are named (harness.cli.BY_NAME), and
#: what they are compared with; the tests of these kernels.
_RINGS = (
    "triton",
    "library",
    "gluon",
    "wgmma",
    *(f"{form}-triton-{road}" for form in ("plain", "factored") for road in ("gluon", "wgmma")),
)
RING_TESTS = ("tests/triton/test_gluon.py", "tests/csrc/test_steps_gpu.py")


@dataclass(frozen=True)
class Part:
    """One step of the run.

    Attributes:
        name: on the command line and in the summary.
        seconds: after which it is stopped, where earlier parts left nothing over.
        command: (results folder, seconds) → arguments.
        needs: () → why it can't run here, or None.
        variables: added to its environment.
        skipped_by: what a failing part says when it could not run here at all.
    """

    name: str
    seconds: int
    command: Callable[[Path, int], list[str]]
    needs: Callable[[], str | None] = lambda: None
    variables: dict[str, str] = field(default_factory=dict)
    skipped_by: tuple[str, ...] = ()


def parts(device: str) -> list[Part]:
    """The whole run, in order; together under nine minutes.

    Args:
        device: "cuda"; "cpu" rehearses the run with the smallest sizes.
    """
    cuda = device == "cuda"
    large = ["--preset", "llama-7b", "--visual-tokens", "256"]

    def program(
        name: str, *sizes: str, switch: str = "", of: str = "", variants: tuple[str, ...] = ()
    ) -> Callable[[Path, int], list[str]]:
        def command(results: Path, seconds: int) -> list[str]:
            # The program begins nothing that it may not finish.
            limit = ["--seconds", str(max(seconds // 2, seconds - 15))]
            stem = f"{name}-{switch or of}" if switch or of else name
            files = ["--json", str(results / f"{stem}.json"), "--plot", "none", "--quiet"]
            options = [*(sizes if cuda else ("--quick",)), *([f"--{switch}"] if switch else [])]
            options += ["--variants", *variants] if variants else []
            return [sys.executable, str(_BENCHMARKS / f"{name}.py"), "--device", device, *options, *limit, *files]

        return command

    def tests(*places: str) -> Callable[[Path, int], list[str]]:
        # A file whose optional packages are missing must not keep the others from running; a test that hangs says where.
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            "--maxfail=20",
            "--tb=short",
            "-rfE",
        ]
        options += ["-o", "faulthandler_timeout=40", "--durations=5"]
        return lambda _results, _seconds: [
            sys.executable, "-m", "pytest", "-m", "gpu and not slow", *options, *places,
        ]  # fmt: skip

    def sanitizer(tool: str) -> Part:
        def command(_results: Path, _seconds: int) -> list[str]:
            # Python's and torch's own probing of the driver is not of interest.
            run = [_find("compute-sanitizer") or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            run += [
                "--report-api-errors",
                "no",
                *(word for name in _OUR_KERNELS for word in ("--kernel-name", f"kns={name}")),
            ]
            return [*run, sys.executable, str(_BENCHMARKS / "sanitized.py"), "--device", device]

        return Part(
            tool,
            {"memcheck": 30, "racecheck": 25}[tool],
            command,
            functools.partial(_lacks, programs=("compute-sanitizer",)),
            # torch's cache hands out parts of large blocks, in which an overrun stays unseen.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            ("Device not supported",),
        )

    def diagnosis(_results: Path, _seconds: int) -> list[str]:
        return [sys.executable, "-m", "memvp_kernels"]

    def build(_results: Path, _seconds: int) -> list[str]:
        return [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]

    build_needs = functools.partial(_lacks, "setuptools", "pybind11", programs=("nvcc",))
    # Each with a process of its own: an illegal access in one kind of kernel leaves the other's tests alone. The decode kernels'
    # tests take the extension that the first part built, for this GPU alone, rather than build one for every GPU.
    built = {"MEMVP_TEST_INSTALLED": "1"} if cuda else {}
    pytest_needs = functools.partial(_lacks, "pytest")
    ignored = [f"--ignore={place}" for place in RING_TESTS]
    quantized_needs = functools.partial(_lacks, "bitsandbytes", "transformers")
    found = [
        Part("build", 65, build, build_needs, {"MEMVP_CUDA": "require", **_architecture()}),
        Part("diagnosis", 15, diagnosis),
        Part("tests-cuda", 40, tests("tests/csrc", *ignored), pytest_needs, built),
        Part("tests-triton", 45, tests("tests/triton", *ignored), pytest_needs),
        Part("decode", 50, program("decode")),
        Part("latency", 55, program("latency", *large, "--batch", "16", "1", "64", "--text-length", "64")),
        Part("training", 55, program("training", *large, "--batch", "16", "4", "--text-length", "64")),
        Part("kernels", 35, program("kernels", *large, "--batch", "16", "1", "--text-length", "512")),
        Part(
            "quantized",
            20,
            program("training", *large, "--batch", "4", "--text-length", "64", switch="quantized"),
            quantized_needs,
        ),
        # Where one of these hangs, nothing comes after it in its part.
        Part("tests-rings", 35, tests(*RING_TESTS), pytest_needs, built),
        Part(
            "rings",
            25,
            program("kernels", *large, "--batch", "16", "1", "--text-length", "512", of="rings", variants=_RINGS),
        ),
        sanitizer("memcheck"),
        Part("sweep", 20, program("sweep", "--preset", "llama-7b")),
        sanitizer("racecheck"),
        Part("tests", 15, tests("tests", "--ignore=tests/csrc", "--ignore=tests/triton"), pytest_needs),
    ]
    # A rehearsal has no minutes to spare, but a slow machine.
    return found if cuda else [dataclasses.replace(part, seconds=4 * part.seconds) for part in found]


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


def _find(program: str) -> str | None:
    """On PATH, or in the CUDA toolkit."""
    return shutil.which(program) or shutil.which(program, path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")


def _lacks(*packages: str, programs: tuple[str, ...] = ()) -> str | None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    missing += [program for program in programs if _find(program) is None]
    return f"not here: {', '.join(missing)}" if missing else None
