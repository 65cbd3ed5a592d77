"""What a result was measured on: the machine, the versions, the commit. No row is worth anything without it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import memvp_kernels
from harness.commit import commit, first_line

__all__ = ["device_name", "environment", "slug"]

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
        found["multiprocessors"] = properties.multi_processor_count
        found["device_memory_bytes"] = properties.total_memory
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
        found["driver"] = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        found["threads"] = torch.get_num_threads()
        found["cores"] = os.cpu_count()
    return found


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
