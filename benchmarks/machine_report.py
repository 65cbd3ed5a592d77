"""What the machine code of every kernel says, for a GPU that need not be here: compiles Triton's offline, prints a table.

    python benchmarks/machine_report.py --architecture 90            every kernel with its widest tile, in bfloat16
    python benchmarks/machine_report.py --architecture 90 --all      every tile of the cost model, every number type (minutes)
    python benchmarks/machine_report.py --architecture 90 --all --number tf32      of these, one number type
    python benchmarks/machine_report.py --architecture 90 --extension              the CUDA kernels of the installed extension instead

Columns: registers per thread; stack and spill instructions (both 0 in a good kernel); shared memory per block; the matrix instructions; for
each loop with matrix instructions, instructions per turn / matrix instructions / of them waiting for the one before (Hopper: all
waiting means serialised, which the next column says in a word) / groups left in flight at the wait; megabytes of its operands, each
moved once; programs over multiprocessors. The last column is the cost model's
prediction for the kernels that it describes; nothing here was timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import triton
from harness.extension_code import extension_kernels
from harness.machine_cases import NUMBERS, cases
from harness.machine_checks import Row, complaints, rows
from harness.machine_code import Machine
from harness.table import markdown, text

_COLUMNS = {
    "kernel": "kernel",
    "case": "case",
    "dtype": "dtype",
    "tile": "tile",
    "warps": "warps",
    "stages": "stages",
    "registers": "registers",
    "stack": "stack",
    "spills": "spills",
    "shared": "shared KiB",
    "matrix": "matrix instruction",
    "loops": "loops",
    "serialised": "serialised",
    "moved": "MB moved",
    "waves": "waves",
    "predicted": "predicted µs",
}
_OF_EXTENSION = ("kernel", "registers", "stack", "spills", "matrix", "loops", "serialised")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Machine code of the Triton kernels, compiled offline.")
    parser.add_argument("--architecture", type=int, choices=(80, 90, 100), default=90)
    parser.add_argument(
        "--all", action="store_true", help="every tile, number type and form, not only the widest tiles"
    )
    parser.add_argument("--number", choices=NUMBERS, help="only cases in these numbers")
    parser.add_argument("--extension", action="store_true", help="what nvcc made of csrc/ when the extension was built")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    if options.extension:
        return _extension(options.architecture, markdown if options.markdown else text)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

    report: list[Row] = []
    found: list[str] = []
    seen: set[str] = set()
    for case in cases(options.architecture, exhaustive=options.all):
        if options.number not in (None, case.number):
            continue
        if sys.stderr.isatty():
            print(f"\r{case.name} …\033[K", end="", file=sys.stderr)
        for row in rows(case, options.architecture, seen):
            report.append(row)
            for complaint in complaints(row):
                found.append(complaint)
                print(f"not as it should be: {complaint}", file=sys.stderr, flush=True)
    table = (markdown if options.markdown else text)([_cells(row) for row in report], _COLUMNS)
    print(f"sm_{options.architecture}, Triton {triton.__version__}\n\n{table}")
    if options.json is not None:
        document = {
            "architecture": options.architecture,
            "triton": triton.__version__,
            "rows": [dataclasses.asdict(row) for row in report],
            "complaints": found,
        }
        options.json.write_text(json.dumps(document, indent=1))
    return 1 if found else 0


def _extension(architecture: int, table: Callable[..., str]) -> int:
    try:
        found = extension_kernels(architecture)
    except RuntimeError as reason:
        print(reason, file=sys.stderr)
        return 1
    rows = [{"kernel": name, **_of_machine(machine)} for name, machine in found.items()]
    print(f"sm_{architecture}, csrc/\n\n{table(rows, {name: _COLUMNS[name] for name in _OF_EXTENSION})}")
    spilled = [name for name, machine in found.items() if machine.stack or machine.spills]
    serialised = [name for name, machine in found.items() if any(loop.serialised for loop in machine.loops)]
    for what, names in (("spills", spilled), ("has its wgmma serialised", serialised)):
        for name in names:
            print(f"not as it should be: {name} {what}", file=sys.stderr)
    return int(bool(spilled or serialised))


def _cells(row: Row) -> dict[str, object]:
    machine = row.machine
    cells = {n: getattr(row, n) for n in ("kernel", "case", "dtype", "stages", "waves", "predicted")}
    cells["tile"] = f"{row.rows}x{row.columns}x{row.block_k}"
    cells["moved"] = round(row.moved / 1e6, 1)
    if machine is None:
        return cells
    return {**cells, "warps": machine.warps, "shared": machine.shared // 1024, **_of_machine(machine)}


def _of_machine(machine: Machine) -> dict[str, object]:
    return {
        **{n: getattr(machine, n) for n in ("registers", "stack", "spills")},
        "matrix": " ".join(sorted({operation.removesuffix(".F32.BF16") for operation in machine.matrix})) or "–",
        "loops": " ".join(
            f"{loop.instructions}/{loop.matrix}/{loop.waits}/{'–' if loop.depth is None else loop.depth}"
            for loop in machine.loops
        ),
        "serialised": "yes" if any(loop.serialised for loop in machine.loops) else "no",
    }


if __name__ == "__main__":
    sys.exit(main())
