"""MemVP in small, on real images: a tiny LLaMA that knows arithmetic from text alone learns to answer about handwritten digits.

    python examples/digits.py              # under 12 minutes on two CPU cores
    python examples/digits.py --quick      # under 2 minutes

The language model is taught arithmetic from text, and frozen. Then two ways to show it an image train for the same number
of steps, on the same images and questions, with the same optimizer: MemVP, and the same projector putting visual tokens
into the prompt. Both answer every kind of question about 360 images that neither has seen. The figures are printed and
written as JSON; curves, a page of images with answers, and what the memory adds in each layer are written as PNG.

The exit code is 1 when MemVP misses a requirement.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_vqa import digits, language_model, results
from tiny_vqa.methods import InMemory, InPrompt, Method
from tiny_vqa.text import batch
from tiny_vqa.training import Run, reply, train

LEARNING_RATE = 5e-3


class Plan(NamedTuple):
    """How long to train, and what MemVP must then reach.

    Attributes:
        text_steps: of the language model.
        image_steps: of each method.
        looks: how often to look at held-out images on the way.
        accuracy: over all questions about held-out images.
        above_blind: how much more than when the image is withheld, which is what guessing gets.
        behind: how far at most under the prompt's accuracy; None: too early to say, since the prompt learns faster at first.
        step_time: how long at most, as a share of the prompt's.
    """

    text_steps: int
    image_steps: int
    looks: int
    accuracy: float
    above_blind: float
    behind: float | None
    step_time: float


FULL = Plan(600, 3500, looks=10, accuracy=0.93, above_blind=0.5, behind=0.02, step_time=0.7)
QUICK = Plan(300, 400, looks=4, accuracy=0.40, above_blind=0.15, behind=None, step_time=0.8)


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few hundred steps, with lower requirements")
    parser.add_argument(
        "--out", type=Path, default=Path("out/digits"), help="folder of the files (default: out/digits)"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, commit = time.perf_counter(), results.checked_out()

    torch.manual_seed(0)
    words, rng = digits.vocabulary(), random.Random(0)
    known, held_out = digits.load()
    base = language_model.build(words, width=digits.WIDTH, layers=digits.LAYERS)
    language_model.teach(base, words, lambda _: digits.lesson(rng), steps=plan.text_steps)

    memory = InMemory("MemVP", copy.deepcopy(base).eval(), digits.MEMORY)
    prompt = InPrompt(copy.deepcopy(base).eval(), words, tokens=digits.TOKENS, vision_dim=digits.VISION_DIM)
    methods: list[Method] = [memory, prompt]
    runs = train(
        methods,
        words,
        known.features,
        digits.batches(known),
        steps=plan.image_steps,
        learning_rates=[LEARNING_RATE] * 2,
        held_out=(held_out.features, digits.one_each(held_out)),
        looks=plan.looks,
    )

    asked = digits.about_every(held_out)
    answers = [reply(method, words, held_out.features, asked) for method in methods]
    scores = [results.score(asked, given) for given in answers]
    blind = results.score(asked, reply(memory, words, held_out.features, asked, blind=True))

    results.draw_curves([runs], arguments.out / "curves.png")
    kinds = len(digits.KINDS)
    one_kind_after_the_other = [image * kinds + image % kinds for image in range(18)]
    results.draw_answers(held_out.pixels, asked, answers[0], one_kind_after_the_other, arguments.out / "answers.png")
    prompts = batch(words, asked.questions[:1], answered=False)
    explained = memory.model.explain_memory(
        prompts.input_ids, prompts.attention_mask, image_features=held_out.features[:1]
    )
    explained.plot(1 - held_out.pixels[0], path=arguments.out / "memory.png")
    rows = [
        results.row(run.name, [right], [run], sum(p.numel() for p in method.trained()))
        for method, run, right in zip(methods, runs, scores, strict=True)
    ]
    found = results.record(
        [*rows, results.row("MemVP, image withheld", [blind])], seconds=time.perf_counter() - started, commit=commit
    )
    (arguments.out / "digits.json").write_text(json.dumps(found, indent=2) + "\n")

    print(f"\n{len(held_out)} held-out images; {results.markdown(found)}\n\n{results.by_kind(found)}")
    print(f"\n{explained}\n\ndigits.json, curves.png, answers.png and memory.png are in {arguments.out}/\n")
    return 0 if meets(plan, scores, blind, runs) else 1


def meets(plan: Plan, scores: list[dict[str, float]], blind: dict[str, float], runs: list[Run]) -> bool:
    """Print each requirement and whether it is met."""
    memory, prompt, guess = scores[0]["all"], scores[1]["all"], blind["all"]
    ratio = runs[0].step_time / runs[1].step_time
    wanted = [
        (f"MemVP {memory:.1%}, wanted at least {plan.accuracy:.0%}", memory >= plan.accuracy),
        (
            f"without the image {guess:.1%}, wanted at least {100 * plan.above_blind:.0f} points less",
            memory >= guess + plan.above_blind,
        ),
        (f"step time {ratio:.2f}x the prompt's, wanted at most {plan.step_time}x", ratio <= plan.step_time),
    ]
    if plan.behind is not None:
        text = f"prompt {prompt:.1%}, wanted at most {100 * plan.behind:.0f} points above MemVP"
        wanted.append((text, memory >= prompt - plan.behind))
    for text, met in wanted:
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    return all(met for _, met in wanted)


if __name__ == "__main__":
    sys.exit(main())
