"""Latency of one FFN and of a whole LLaMA that has seen an image: visual memory against visual tokens in the prompt.

    python benchmarks/latency.py                          # picks shapes for the device; under 90 s on two CPU cores
    python benchmarks/latency.py --preset llama-7b --batch 1 16 64 --visual-tokens 256 576

Weights are random, inputs are real (photographs cut into patches, English text). Every variant is checked against float64 before it
is timed. Compare variants within a case; a speedup over the prompt form under 1 means that the latter wins.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

import ffn_case
import llama
from measure import Candidate, Case, run
from options import Setting, parser, settle
from plots import plot_program
from rows import show

CPU = {"batch": (4,), "text_length": (64,), "visual_tokens": (256, 64)}
CUDA = {"batch": (16, 1, 64), "text_length": (64, 512), "visual_tokens": (256, 576)}

_NAMES = {
    ("model", "prefill"): "model, first token",
    ("model", "decode"): "model, per token",
    ("ffn", "prefill"): "ffn, prefill",
    ("ffn", "decode"): "ffn, decode",
}


def cases(setting: Setting) -> Iterator[Case]:
    """One FFN and the whole model, before and at the next token, for every combination of sizes."""
    model = functools.cache(lambda: llama.Llama(setting))

    def case(level: str, phase: str, size: tuple[int, int, int]) -> Case:
        batch, length, visual = size
        decode = phase == "decode"
        tokens = 1 if decode and level == "ffn" else length
        here = setting.at(size, level=level)

        def found() -> Sequence[Candidate]:
            of = {"sequences": batch, "text_length": tokens, "visual_tokens": visual, "decode": decode}
            return ffn_case.candidates(here, **of) if level == "ffn" else llama.candidates(here, model(), **of)

        name = f"{_NAMES[level, phase]} {batch}×{tokens}, image {visual}"
        layers = 1 if level == "ffn" else setting.layers
        row = setting.row(name, (batch, tokens, visual), level=level, phase=phase, layers=layers)
        return Case(row, found, host=True, gradients=False)

    for size in setting.sizes():
        for level, phase in _NAMES:
            # An FFN that decodes does not know how long the text is.
            if level == "model" or (not setting.sweep and (phase == "prefill" or size[1] == setting.text_length[0])):
                yield case(level, phase, size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    options = parser(str(__doc__).splitlines()[0], program="latency", sweep=True).parse_args(arguments)
    setting = settle(options, cpu=CPU, cuda=CUDA)
    results, left_out = run(setting, list(cases(setting)))
    show(results, left_out)
    plot_program(results.document(), setting.plot)
    return results.exit_status


if __name__ == "__main__":
    sys.exit(main())
