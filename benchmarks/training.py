"""Time and peak memory of a training step (forward, backward, optimiser; frozen base): visual memory against visual tokens.

    python benchmarks/training.py                         # picks shapes for the device
    python benchmarks/training.py --preset llama-7b --batch 16 --checkpointing --recompute

Trained are projector and positions, in float32, as in the paper; 10 % of the visual activations are dropped. Every variant's loss and
gradients are checked against float64, with nothing dropped, before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from harness import quantised_case
from harness.cli import Setting, common_parser, settle
from harness.measure import Candidate
from harness.model_case import Model
from harness.plots import plot_speedups
from harness.program import Job, run
from harness.results import Row
from harness.show import show
from harness.training_case import ffn_candidates, model_candidates

CPU = {"batch": (2,), "text_length": (64,), "visual_tokens": (256,)}
CUDA = {"batch": (16, 4), "text_length": (64, 512), "visual_tokens": (256,)}


def jobs(setting: Setting, *, recompute: bool, checkpointing: bool, quantized: bool) -> Iterator[Job]:
    """A model's and an FFN's step for every combination of sizes; checkpointing wraps layers, so it leaves the FFN alone."""
    models: list[Model] = []

    def model() -> Model:
        if not models:
            models.append(Model.of(setting))
        return models[0]

    chosen = {"checkpointing": checkpointing, "recompute": recompute, "quantized": quantized}
    switches = "".join(f", {name}" for name, on in chosen.items() if on)

    def job(level: str, batch: int, length: int, visual: int) -> Job:
        here = setting.at((batch, length, visual), level=level)

        def found() -> Sequence[Candidate]:
            if level == "ffn":
                return ffn_candidates(
                    here, sequences=batch, text_length=length, visual_tokens=visual, recompute=recompute
                )
            candidates = quantised_case.candidates if quantized else model_candidates
            return candidates(
                here,
                model(),
                sequences=batch,
                text_length=length,
                visual_tokens=visual,
                recompute=recompute,
                checkpointing=checkpointing,
            )

        template = Row(
            case=f"{level}, training step {batch}×{length}, image {visual}{switches}",
            variant="",
            dtype=setting.dtype_name,
            level=level,
            phase="training",
            preset=setting.preset_name,
            layers=1 if level == "ffn" else setting.layers,
            sequences=batch,
            text_length=length,
            visual_tokens=visual,
        )
        return Job(template, found)

    for size in setting.sizes():
        yield job("model", *size)
        if not checkpointing and not quantized:
            yield job("ffn", *size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; the exit status is 1 when a variant was wrong or broke."""
    switches = argparse.ArgumentParser(add_help=False)
    switches.add_argument("--checkpointing", action="store_true", help="every decoder layer runs again in the backward")
    switches.add_argument("--recompute", action="store_true", help="our FFNs keep x instead of the pre-activations")
    switches.add_argument(
        "--quantized",
        action="store_true",
        help="MemVPModel alone, on its base as it is and on one in 4 bits (bitsandbytes)",
    )
    chosen, _ = switches.parse_known_args(arguments)
    # Files of their own, so that one run does not overwrite the other's rows.
    program = "-".join(("training", *(name for name, on in vars(chosen).items() if on)))
    parser = common_parser(str(__doc__).splitlines()[0], program=program, parents=(switches,))
    setting = settle(parser.parse_args(arguments), cpu=CPU, cuda=CUDA)
    plan = jobs(setting, **vars(chosen))
    results, left_out = run(program, setting, list(plan))
    show(results, setting, left_out=left_out)
    if setting.plot is not None:
        plot_speedups([results.document()], setting.plot)
    return int(any(row.status in ("wrong", "failed") for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())
