"""Compiles the Triton kernels for a GPU that need not be here and prints what their machine code says.

    python -m tests.machine_code --architecture 90                 every kernel with its widest tile, in bfloat16; elsewhere the large ones
    python -m tests.machine_code --architecture 90 --all           every tile and number type (long)
    python -m tests.machine_code --architecture 90 --all --number tf32

Complaints go to stderr; the exit status is 1 when there is one. Cubins stay in Triton's cache, so a second run only reads.
"""

from __future__ import annotations

import argparse
import sys

import triton

from tests.machine_code.checks import KERNELS, Row, complaints, row_of
from tests.machine_code.launches import NUMBERS, cases, launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, choices=(80, 90, 100, 120), default=90)
    parser.add_argument(
        "--all", action="store_true", help="every tile, number type and form, not only the widest tiles"
    )
    parser.add_argument("--number", choices=NUMBERS, help="only cases in these numbers")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

    wrong, seen, named = 0, set(), set()
    print(f"sm_{options.architecture}, Triton {triton.__version__}: registers, shared memory, matrix instructions")
    for case in cases(options.architecture, exhaustive=options.all):
        if options.number not in (None, case.number):
            continue
        for launched in launches(case, options.architecture):
            known = launched.error or launched.kernel.hash
            if known in seen:
                continue
            seen.add(known)
            named.add(launched.name)
            row = row_of(case, options.architecture, launched)
            print(_line(row), flush=True)
            for complaint in complaints(row):
                wrong += 1
                print(complaint, file=sys.stderr, flush=True)
    forgotten = set(KERNELS) - named
    if forgotten and options.number is None and (options.all or options.architecture == 90):
        wrong += 1
        print(f"no case launches {', '.join(sorted(forgotten))}", file=sys.stderr)
    return int(wrong > 0)


def _line(row: Row) -> str:
    tile, machine = "x".join(map(str, row.tile)), row.machine
    said = f"{row.kernel:20} {tile:12} {row.dtype:9} {row.case:44}"
    if machine is None:
        return said
    return f"{said} {machine.registers:4} {row.shared // 1024:4} KiB  {' '.join(machine.matrix)}"


if __name__ == "__main__":
    sys.exit(main())
