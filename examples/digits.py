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
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from digit_questions import images, language_model, questions, results
from digit_questions.methods import InMemory, InPrompt, Method
from digit_questions.training import Run, held_out_questions, reply, train
from tabulate import tabulate

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
    started = time.perf_counter()

    torch.manual_seed(0)
    words = questions.Vocabulary()
    known, held_out = images.load()
    base = language_model.build(words)
    language_model.teach_arithmetic(base, words, steps=plan.text_steps)

    memory, prompt = InMemory(copy.deepcopy(base).eval()), InPrompt(copy.deepcopy(base).eval(), words)
    methods: list[Method] = [memory, prompt]
    runs = train(methods, words, known, held_out, steps=plan.image_steps, learning_rate=LEARNING_RATE, looks=plan.looks)

    scores, answers = [], []
    for method in methods:
        asked, rows = held_out_questions(held_out, method.shown)
        answers.append(reply(method, words, held_out, asked, rows))
        scores.append(results.score(asked, answers[-1]))
    asked, rows = held_out_questions(held_out, memory.shown)
    blind = results.score(asked, reply(memory, words, held_out, asked, rows, blind=True))

    results.draw_curves(runs, arguments.out / "curves.png")
    results.draw_answers(held_out, asked, answers[0], rows, arguments.out / "answers.png")
    prompts = questions.batch(words, asked[:1], answered=False)
    explained = memory.model.explain_memory(
        prompts.input_ids, prompts.attention_mask, image_features=held_out.features[:1]
    )
    explained.plot(1 - held_out.pixels[0], path=arguments.out / "memory.png")
    found = results.record(methods, runs, scores, blind, seconds=time.perf_counter() - started)
    (arguments.out / "digits.json").write_text(json.dumps(found, indent=2) + "\n")

    by_kind = [[row["name"], *(f"{100 * row['right'][kind]:.1f}" for kind in questions.KINDS)] for row in found["rows"]]
    print(f"\n{len(held_out)} held-out images; {results.markdown(found)}")
    print(f"\nright answers by kind of question, %\n\n{tabulate(by_kind, ['', *questions.KINDS])}")
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
