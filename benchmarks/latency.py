"""Latency of one FFN and of a whole LLaMA that has seen an image: visual memory against visual tokens in the prompt.

    python benchmarks/latency.py                          # picks shapes for the device; under 90 s on two CPU cores
    python benchmarks/latency.py --preset llama-7b --batch 1 16 64 --visual-tokens 256 576

Weights are random, inputs are real (photographs cut into patches, English text). Every variant is checked against float64 before
it is timed. Compare variants within a case; a speed-up over the prompt-length form under 1 means that the latter wins.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

from harness.cli import Setting, common_parser, settle
from harness.ffn_case import candidates as ffn_candidates
from harness.measure import Candidate
from harness.model_case import Model
from harness.model_case import candidates as model_candidates
from harness.plots import plot_speedups
from harness.program import Job, run
from harness.results import Row
from harness.show import show

CPU = {"batch": (4,), "text_length": (64,), "visual_tokens": (256, 64)}
CUDA = {"batch": (16, 1, 64), "text_length": (64, 512), "visual_tokens": (256, 576)}


def jobs(setting: Setting) -> Iterator[Job]:
    """One FFN and the whole model, before and at the next token, for every combination of sizes."""
    models: list[Model] = []

    def model() -> Model:
        if not models:
            models.append(Model.of(setting))
        return models[0]

    def job(level: str, phase: str, name: str, batch: int, length: int, visual: int) -> Job:
        decode = phase == "decode"
        tokens = 1 if decode and level == "ffn" else length
        here = setting.at((batch, length, visual), level=level)

        def found() -> Sequence[Candidate]:
            if level == "ffn":
                return ffn_candidates(here, sequences=batch, text_length=tokens, visual_tokens=visual, decode=decode)
            return model_candidates(
                here, model(), sequences=batch, text_length=length, visual_tokens=visual, decode=decode
            )

        template = Row(
            case=f"{name} {batch}×{tokens}, image {visual}",
            variant="",
            dtype=setting.dtype_name,
            level=level,
            phase=phase,
            preset=setting.preset_name,
            layers=1 if level == "ffn" else setting.layers,
            sequences=batch,
            text_length=tokens,
            visual_tokens=visual,
        )
        return Job(template, found, host=level == "ffn", gradients=False)

    for batch, length, visual in setting.sizes():
        make = functools.partial(job, batch=batch, length=length, visual=visual)
        yield make("model", "prefill", "model, first token")
        yield make("model", "decode", "model, per token")
        yield make("ffn", "prefill", "ffn, prefill")
        if length == setting.text_length[0]:  # an FFN that decodes does not know how long the text is
            yield make("ffn", "decode", "ffn, decode")


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    parser = common_parser(str(__doc__).splitlines()[0], program="latency")
    setting = settle(parser.parse_args(arguments), cpu=CPU, cuda=CUDA)
    results, left_out = run("latency", setting, list(jobs(setting)))
    show(results, setting, left_out=left_out)
    if setting.plot is not None:
        plot_speedups([results.document()], setting.plot)
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
