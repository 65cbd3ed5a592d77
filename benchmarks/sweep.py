"""Speed-up of visual memory over visual tokens in the prompt, against text length and image size: a few layers, so many sizes.

    python benchmarks/sweep.py                            # picks shapes for the device
    python benchmarks/sweep.py --preset llama-7b --layers 4 --text-length 64 16 256 --visual-tokens 256 64 576

One size changes at a time, the others staying at the first of their list. The layers are a whole model's, with its head; a model of
more layers has ratios a little further from 1.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence

from harness import model_case, training_case
from harness.cli import Setting, common_parser, settle
from harness.measure import Candidate
from harness.model_case import Model
from harness.plots import plot_sweep
from harness.program import Job, run
from harness.results import Row
from harness.show import show

CPU = {"batch": (4,), "text_length": (64, 16), "visual_tokens": (256, 64)}
CUDA = {"batch": (16,), "text_length": (64, 16, 256), "visual_tokens": (256, 64, 576)}
LAYERS = {"cpu": 2, "cuda": 4}
VARIANTS = ("text", "official-eager", "factored-auto", "factored-torch", "MemVPModel")
_PHASES = {"prefill": "first token", "training": "training step", "decode": "per token"}


def jobs(setting: Setting) -> Iterator[Job]:
    """Every size, in one phase after the other."""
    models: list[Model] = []

    def model() -> Model:
        if not models:
            models.append(Model.of(setting))
        return models[0]

    def found(phase: str, batch: int, length: int, visual: int) -> Sequence[Candidate]:
        size = {"sequences": batch, "text_length": length, "visual_tokens": visual}
        if phase == "training":
            return training_case.model_candidates(setting, model(), **size, recompute=False, checkpointing=False)
        return model_case.candidates(setting, model(), **size, decode=phase == "decode")

    first = setting.sizes()[0]
    sizes = [size for size in setting.sizes() if sum(n != m for n, m in zip(size, first, strict=True)) <= 1]
    for phase, name in _PHASES.items():
        for batch, length, visual in sizes:
            template = Row(
                case=f"{setting.layers} layers, {name} {batch}×{length}, image {visual}",
                variant="",
                dtype=setting.dtype_name,
                level="model",
                phase=phase,
                preset=setting.preset_name,
                layers=setting.layers,
                sequences=batch,
                text_length=length,
                visual_tokens=visual,
            )
            found_here = functools.partial(found, phase, batch, length, visual)
            yield Job(template, found_here, gradients=phase == "training")


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    parser = common_parser(str(__doc__).splitlines()[0], program="sweep")
    setting = settle(parser.parse_args(arguments), cpu=CPU, cuda=CUDA)
    few = min(setting.layers, LAYERS[setting.device.type])
    setting = dataclasses.replace(setting, compiled=False, only=setting.only or VARIANTS, layers=few)
    results, left_out = run("sweep", setting, list(jobs(setting)))
    show(results, setting, left_out=left_out)
    if setting.plot is not None:
        plot_sweep([results.document()], setting.plot, against="visual_tokens", label="visual tokens of the image")
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
