"""Measures this machine for the record: every program into benchmarks/results/<machine>/, then the report.

    make report                          # or: python benchmarks/record.py
    python benchmarks/record.py --only latency

Takes a few minutes on two quiet CPU cores. Commit first: the rows name the commit that they were measured at.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from harness.commit import DIRTY, commit_for_the_record
from harness.environment import device_name, slug

HERE = Path(__file__).resolve().parent

#: What each program is asked to run on a CPU. Sizes besides the first are the sweep's affair.
CPU = {
    "latency": ["--compile", "--batch", "4", "--visual-tokens", "256"],
    "training": ["--compile", "--batch", "2", "--visual-tokens", "256"],
    "sweep": ["--batch", "4"],
    "kernels": ["--batch", "4"],
    "decode": ["--batch", "16", "1"],
}
CUDA: dict[str, list[str]] = {program: [] for program in CPU}


def main(arguments: list[str] | None = None) -> int:
    """Runs the programs one after the other, then the report; the exit status is 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CPU), default=list(CPU))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        commit = commit_for_the_record()
    except ValueError as error:
        sys.exit(str(error))
    if commit.endswith(DIRTY):
        print(f"UNCOMMITTED CHANGES: rows will name {commit}, which is not what is measured", file=sys.stderr)
    folder = HERE / "results" / slug(device_name(device))
    extra = CUDA if device.type == "cuda" else CPU
    status = 0
    for program in options.only:
        command = [sys.executable, str(HERE / f"{program}.py"), "--device", options.device, *extra[program]]
        command += ["--json", str(folder / f"{program}.json"), "--plot", "none"]
        print("+", " ".join(command), flush=True)
        begun = time.monotonic()
        status |= subprocess.run(command).returncode
        print(f"{program}: {time.monotonic() - begun:.0f} s", flush=True)
    status |= subprocess.run([sys.executable, str(HERE / "report.py")]).returncode
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())
