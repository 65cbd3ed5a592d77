"""A decode step of one FFN, against the floor of reading its weights once: ours, CUDA-graphed PyTorch, torch.compile.

    python benchmarks/decode.py                           # LLaMA-7B's FFN on a GPU; small shapes on a CPU
    python benchmarks/decode.py --batch 1 16 --images each

Every sequence contributes one token. GB/s counts the fewest bytes that a form must move; "% of stream" sets it against a read-only
stream measured in the same run. Every variant is checked against float64 before it is timed, reads operands that have left the
cache, and on a GPU runs from a CUDA graph; "host µs" is a call outside of one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from harness.cli import Setting, common_parser, settle
from harness.decode_case import IMAGES, candidates
from harness.plots import plot_floor
from harness.program import Job, run
from harness.results import Row
from harness.show import cells, show

CPU = {"batch": (1, 4), "text_length": (1,), "visual_tokens": (64,)}
CUDA = {"batch": (64, 16, 1, 4), "text_length": (1,), "visual_tokens": (256,)}

_NAMES = {"none": "no image", "one": "one image for all", "each": "an image each"}
_COLUMNS = {
    "variant": "variant",
    "median_us": "median µs",
    "p20_us": "p20",
    "p80_us": "p80",
    "gbs": "GB/s",
    "percent_of_stream": "% of stream",
    "percent_of_floor": "% of floor",
    "speedup_vs_text": "× text only",
    "host_us": "host µs",
    "error": "error",
    "verdict": "",
}


def jobs(setting: Setting, images: list[str]) -> Iterator[Job]:
    """Every number of tokens about every number of images, an image each first: what serving looks like."""
    for visual in setting.visual_tokens:
        for kind in images:
            for tokens in setting.batch:
                if kind == "one" and tokens == 1 and "each" in images:
                    continue  # one image each is one for all
                template = Row(
                    case=f"decode, {tokens} {'token' if tokens == 1 else 'tokens'}, {_NAMES[kind]}",
                    variant="",
                    dtype=setting.dtype_name,
                    level="ffn",
                    phase="decode",
                    preset=setting.preset_name,
                    layers=1,
                    sequences=tokens,
                    text_length=1,
                    visual_tokens=0 if kind == "none" else visual,
                )
                found = functools.partial(candidates, setting, tokens=tokens, images=kind, visual_tokens=visual)
                yield Job(template, found, host=True, gradients=False)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    parser = common_parser(str(__doc__).splitlines()[0], program="decode")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES), help="what the tokens are about")
    options = parser.parse_args(arguments)
    setting = settle(options, cpu=CPU, cuda=CUDA)
    results, left_out = run("decode", setting, list(jobs(setting, options.images)))
    stream = results.environment["roofs"]["stream_gbs"]

    def in_microseconds(row: Row) -> dict[str, Any]:
        times = {f"{name}_us": getattr(row, f"{name}_ms") for name in ("median", "p20", "p80")}
        found = {name: None if ms is None else 1000 * ms for name, ms in times.items()}
        return {**cells(row), **found, "percent_of_stream": row.gbs and 100 * row.gbs / stream}

    show(results, setting, left_out=left_out, columns=_COLUMNS, cells=in_microseconds)
    if setting.plot is not None:
        plot_floor([results.document()], setting.plot)
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
