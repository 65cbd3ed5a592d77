"""`python -m memvp_kernels`: what this machine has, and the reason for what it lacks."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from memvp_kernels import dispatch as choose
from memvp_kernels import warmup
from memvp_kernels.backends import cuda
from memvp_kernels.backends.cuda import extension
from memvp_kernels.version import __version__

__all__ = ["main", "rows"]

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "accelerate", "peft")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return [("GPU", "none" + ("" if built else " (this torch is a build for CPUs)"))]
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            (
                f"GPU {i}",
                f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs",
            )
        )
    return found


def rows() -> list[tuple[str, str]]:
    """(what, fact) pairs in the order they are printed."""
    _, reason, build = cuda.status()
    facts = [("memvp_kernels", __version__), ("python", platform.python_version())]
    facts += [(p, _version(p)) for p in _PACKAGES]
    facts += [("CUDA of torch", torch.version.cuda or "none"), *_gpus()]
    facts.append(
        ("extension", f"built with CUDA {build['cuda']} for {build['archs']}" if build else f"not here: {reason}")
    )
    for name, missing in choose.available().items():
        facts.append((f"backend {name}", "ready" if missing is None else f"not here: {missing}"))
    missing = extension.hopper_status()
    facts.append(("cuda, large steps", "ready" if missing is None else f"not here: {missing}"))
    return facts


def main() -> None:
    facts = rows()
    width = max(len(what) for what, _ in facts)
    for what, fact in facts:
        print(f"{what:<{width}}  {fact}" if what != "memvp_kernels" else f"memvp_kernels {fact}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["warmup"]:
        sys.exit(warmup.main(sys.argv[2:]))
    main()
