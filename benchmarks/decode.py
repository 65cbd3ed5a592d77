"""A decode step of one FFN, against the roofline bound of reading its weights once: ours, CUDA-graphed PyTorch, torch.compile.

    python benchmarks/decode.py                           # LLaMA-7B's FFN on a GPU; small shapes on a CPU
    python benchmarks/decode.py --batch 1 16 --images each

Every sequence contributes one token. GB/s counts the fewest bytes that a form must move; "% of read" sets it against a read-only
stream measured in the same run. Every variant is checked against float64 before it is timed, reads operands that have left the
cache, and on a GPU runs from a CUDA graph; "host µs" is a call outside of one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import ffn_case
from measure import Candidate, Case, run
from options import Setting, parser, settle
from plots import plot_program
from rows import Row, cells, show
from variants import decode_variants

CPU = {"batch": (1, 4), "text_length": (1,), "visual_tokens": (64,)}
CUDA = {"batch": (64, 16, 1, 4), "text_length": (1,), "visual_tokens": (256,)}

#: What the tokens of a step are about, the commonest first.
IMAGES = {"each": "an image each", "none": "no image", "one": "one image for all"}
_COLUMNS = {
    "variant": "variant",
    "median_us": "median µs",
    "p20_us": "p20",
    "p80_us": "p80",
    "gbs": "GB/s",
    "percent_of_read": "% of read",
    "percent_of_roofline": "% of roofline",
    "speedup_vs_text": "× text only",
    "host_us": "host µs",
    "error": "error",
    "verdict": "",
}


def candidates(setting: Setting, *, tokens: int, images: str, visual_tokens: int) -> list[Candidate]:
    """The variants of one step; tokens about one image are one sequence's, so that plain PyTorch, too, reads the image once."""
    together = images == "one"
    return ffn_case.candidates(
        setting,
        sequences=1 if together else tokens,
        text_length=tokens if together else 1,
        visual_tokens=visual_tokens,
        decode=not together,
        chosen=decode_variants(setting.device, compiled=setting.compiled, images=images != "none"),
    )


def cases(setting: Setting, images: list[str]) -> Iterator[Case]:
    """Every number of tokens about every number of images."""
    for visual in setting.visual_tokens:
        for kind in images:
            for tokens in setting.batch:
                if kind == "one" and tokens == 1 and "each" in images:
                    continue  # one image each is one for all
                name = f"decode, {tokens} {'token' if tokens == 1 else 'tokens'}, {IMAGES[kind]}"
                size = (tokens, 1, 0 if kind == "none" else visual)
                found = functools.partial(candidates, setting, tokens=tokens, images=kind, visual_tokens=visual)
                yield Case(
                    setting.row(name, size, level="ffn", phase="decode", layers=1), found, host=True, gradients=False
                )


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    own = parser(str(__doc__).splitlines()[0], program="decode")
    text = "what the tokens are about (default: all three)"
    own.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES), help=text)
    options = own.parse_args(arguments)
    setting = settle(options, cpu=CPU, cuda=CUDA)
    results, left_out = run(setting, list(cases(setting, options.images)))
    stream = results.environment["peaks"]["stream_gbs"]

    def in_microseconds(row: Row) -> dict[str, Any]:
        times = {f"{name}_us": getattr(row, f"{name}_ms") for name in ("median", "p20", "p80")}
        found = {name: None if ms is None else 1000 * ms for name, ms in times.items()}
        return {**cells(row), **found, "percent_of_read": row.gbs and 100 * row.gbs / stream}

    show(results, left_out, columns=_COLUMNS, cells=in_microseconds)
    plot_program(results.document(), setting.plot)
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
