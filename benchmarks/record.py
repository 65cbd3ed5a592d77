"""Measures this machine for the record: latency, training, kernels and decode into benchmarks/results/<machine>/, then the report.

    make report                          # or: python benchmarks/record.py
    python benchmarks/record.py --only latency

Takes a few minutes on two quiet CPU cores. Commit first: the rows name the commit that they were measured at.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from harness.environment import device_name, slug

HERE = Path(__file__).resolve().parent

#: What each program is asked to run on a CPU, beyond its defaults: enough shapes for every plot of the report.
CPU = {
    "latency": ["--compile", "--text-length", "64", "16", "--visual-tokens", "256", "64"],
    "training": ["--compile", "--text-length", "64", "16", "--visual-tokens", "256", "64"],
    "kernels": [],
    "decode": ["--batch", "1", "16"],
}
CUDA: dict[str, list[str]] = {"latency": [], "training": [], "kernels": [], "decode": []}


def main(arguments: list[str] | None = None) -> int:
    """Runs the programs one after the other, then the report; the exit status is 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(CPU), default=list(CPU))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    folder = HERE / "results" / slug(device_name(device))
    extra = CUDA if device.type == "cuda" else CPU
    status = 0
    for program in options.only:
        command = [sys.executable, str(HERE / f"{program}.py"), "--device", options.device, *extra[program]]
        command += ["--json", str(folder / f"{program}.json"), "--plot", "none"]
        print("+", " ".join(command), flush=True)
        status |= subprocess.run(command).returncode
    status |= subprocess.run([sys.executable, str(HERE / "report.py")]).returncode
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())
