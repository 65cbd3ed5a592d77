"""What a result was measured on: the machine, the versions, the commit. No row is worth anything without it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import memvp_kernels

__all__ = ["UNKNOWN_COMMIT", "commit", "device_name", "environment", "slug"]

UNKNOWN_COMMIT = "unknown"
_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = ("triton", "transformers", "liger-kernel", "peft", "numpy", "scikit-learn")


def environment(device: torch.device, program: str) -> dict[str, Any]:
    """The machine, the versions and the commit as plain JSON values.

    Args:
        device: the one measured.
        program: which program measures ("latency", …).
    """
    found: dict[str, Any] = {
        "program": program,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": device_name(device),
        "device_type": device.type,
        "memvp_kernels": memvp_kernels.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton_interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in _PACKAGES:
        found[package.replace("-", "_")] = _package_version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["device_memory_bytes"] = properties.total_memory
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        found["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        found["threads"] = torch.get_num_threads()
        found["cores"] = os.cpu_count()
    return found


def commit() -> str:
    """The checked-out commit, with "-dirty" when tracked files differ from it; where there is no git, what MEMVP_COMMIT says."""
    git = ["git", "-C", str(_REPOSITORY)]
    top = _first_line([*git, "rev-parse", "--show-toplevel"])
    head = _first_line([*git, "rev-parse", "HEAD"])
    if head is None or top is None or Path(top).resolve() != _REPOSITORY:
        return os.environ.get("MEMVP_COMMIT", UNKNOWN_COMMIT)
    # Results do not count as changes: a run that wrote latency.json may be followed by one that writes training.json.
    changed = _first_line(
        [
            *git,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ".",
            ":!benchmarks/results",
            ":!benchmarks/REPORT.md",
            ":!README.md",
        ]
    )
    return head + ("-dirty" if changed else "")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        model = named.group(1).strip() if named else model
    return f"{model} CPU, {os.cpu_count()} cores"


def slug(name: str) -> str:
    """A folder name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
