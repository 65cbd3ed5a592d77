"""Each Triton kernel, and the operator's training forward and backward, against its floor, bare cuBLAS and Liger.

    python benchmarks/kernels.py                          # picks shapes for the device
    python benchmarks/kernels.py --preset llama-7b --batch 16 --text-length 512

The floor is counted in harness/rooflines.py from roofs measured in the same run. The row "matmul" times the bare matrix products
(torch.mm and torch.bmm, without activation): a fused kernel does more than that, and is good when it is no slower.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

from harness import core_case, kernel_case, operator_case
from harness.cli import Setting, common_parser, settle
from harness.measure import Candidate
from harness.plots import plot_floor
from harness.program import Job, run
from harness.results import Row
from harness.show import show

CPU = {"batch": (4,), "text_length": (64,), "visual_tokens": (256,)}
CUDA = {"batch": (16, 1), "text_length": (512,), "visual_tokens": (256,)}

_COLUMNS = {
    "variant": "variant",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "speedup_vs_matmul": "× matmul",
    "percent_of_floor": "% of floor",
    "tflops": "TFLOP/s",
    "gbs": "GB/s",
    "peak_mb": "peak MB",
    "host_us": "host µs",
    "error": "error",
    "verdict": "",
}


def jobs(setting: Setting) -> Iterator[Job]:
    """The operator's two passes first, then its kernels, for every combination of sizes."""

    def job(
        level: str, name: str, found: Callable[..., Sequence[Candidate]], batch: int, length: int, visual: int
    ) -> Job:
        template = Row(
            case=f"{name} {batch}×{length}, image {visual}",
            variant="",
            dtype=setting.dtype_name,
            level=level,
            phase=name,
            preset=setting.preset_name,
            layers=1,
            sequences=batch,
            text_length=length,
            visual_tokens=visual,
        )
        return Job(
            template, functools.partial(found, sequences=batch, text_length=length, visual_tokens=visual), host=True
        )

    for size in setting.sizes():
        yield job("ffn", "training forward", functools.partial(operator_case.forward_candidates, setting), *size)
        yield job("ffn", "training backward", functools.partial(operator_case.backward_candidates, setting), *size)
        for case in (kernel_case, core_case):
            for name in case.KERNELS:
                yield job("kernel", f"kernel {name}", functools.partial(case.candidates, setting, name), *size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    parser = common_parser(str(__doc__).splitlines()[0], program="kernels")
    setting = settle(parser.parse_args(arguments), cpu=CPU, cuda=CUDA)
    results, left_out = run("kernels", setting, list(jobs(setting)))
    show(results, setting, left_out=left_out, columns=_COLUMNS)
    if setting.plot is not None:
        plot_floor([results.document()], setting.plot)
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
