"""MemVP in small, on real images: a tiny LLaMA that knows arithmetic from text alone learns to answer about handwritten digits.

    python examples/digits.py              # under 12 minutes on two CPU cores
    python examples/digits.py --quick      # under 2 minutes

The language model is taught arithmetic from text, and frozen. Then two ways to show it an image train for the same number
of steps, on the same images and questions, with the same optimiser: MemVP, and the same projector putting visual tokens
into the prompt. Both answer every kind of question about 360 images that neither has seen. The figures are printed and
written as JSON; curves, a page of images with answers, and what the memory adds in each layer are written as PNG.

The exit code is 1 when MemVP misses its bars.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from digit_questions import images, language_model, questions, record, report
from digit_questions.contestants import Contestant, InMemory, InPrompt
from digit_questions.race import Run, held_out_questions, race, reply

LEARNING_RATE = 5e-3


class Plan(NamedTuple):
    """How long to train, and what MemVP must then reach.

    Attributes:
        text_steps: of the language model.
        image_steps: of each contestant.
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
    parser.add_argument("--quick", action="store_true", help="a few hundred steps and bars to match")
    parser.add_argument(
        "--out", type=Path, default=Path("out/digits"), help="folder for the PNGs (default: out/digits)"
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
    told = _accuracy_from_text(base, words, held_out)

    shape = {"tokens": known.features.shape[1], "vision_dim": known.features.shape[2]}
    memory = InMemory(copy.deepcopy(base).eval(), **shape)
    prompt = InPrompt(copy.deepcopy(base).eval(), words, **shape)
    contestants: list[Contestant] = [memory, prompt]
    runs = race(
        contestants, words, known, held_out, steps=plan.image_steps, learning_rate=LEARNING_RATE, looks=plan.looks
    )

    scores, answers = [], []
    for contestant in contestants:
        asked, rows = held_out_questions(held_out, contestant.shown)
        answers.append(reply(contestant, words, held_out, asked, rows))
        scores.append(report.score(asked, answers[-1]))
    asked, rows = held_out_questions(held_out, memory.shown)
    blind = report.score(asked, reply(memory, words, held_out, asked, rows, blind=True))

    names = [run.name for run in runs]
    print(f"\nright answers about {len(held_out)} held-out images, per cent\n")
    print(_accuracy_table([*names, "MemVP, image withheld", "the digit told in text"], [*scores, blind, told]))
    print("\ntraining\n")
    print(_cost_table(contestants, runs))

    report.draw_curves(runs, arguments.out / "curves.png")
    report.draw_answers(held_out, asked, answers[0], rows, arguments.out / "answers.png")
    prompts = questions.batch(words, asked[:1], answered=False)
    explained = memory.model.explain_memory(
        prompts.input_ids, prompts.attention_mask, image_features=held_out.features[:1]
    )
    explained.plot(1 - held_out.pixels[0], path=arguments.out / "memory.png")
    seconds = time.perf_counter() - started
    record.write(record.make(contestants, runs, scores, blind, seconds=seconds), arguments.out / "digits.json")
    print(f"\n{explained}\n\ndigits.json, curves.png, answers.png and memory.png are in {arguments.out}/")

    met = _bars(plan, scores, blind, runs)
    print(f"{seconds:.0f} s in all, on {torch.get_num_threads()} threads")
    return 0 if met else 1


def _accuracy_from_text(
    base: torch.nn.Module, words: questions.Vocabulary, held_out: images.Images
) -> dict[str, float]:
    """What the language model itself can do, told the digit: nothing that shows it an image can be expected to do better."""
    asked, _ = held_out_questions(held_out, "{}")
    told = [q._replace(prompt=q.prompt.format(questions.spelled(d))) for q, d in _with_digits(asked, held_out)]
    prompts = questions.batch(words, told, answered=False)
    out = base.eval().generate(  # type: ignore[operator]
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=2, do_sample=False
    )
    return report.score(told, [words.decode(ids) for ids in out[:, prompts.input_ids.shape[1] :].tolist()])


def _with_digits(asked: list[questions.Question], held_out: images.Images) -> list[tuple[questions.Question, int]]:
    per_image = len(questions.KINDS)
    return [(question, held_out.digits[number // per_image]) for number, question in enumerate(asked)]


def _accuracy_table(names: list[str], scores: list[dict[str, float]]) -> str:
    columns = ["all", *questions.KINDS]
    return report.aligned(
        [["", *columns]]
        + [[name, *(f"{100 * score[c]:.1f}" for c in columns)] for name, score in zip(names, scores, strict=True)]
    )


def _cost_table(contestants: list[Contestant], runs: list[Run]) -> str:
    rows = [["", "steps", "ms per step", "text tokens/s", "trainable parameters"]]
    for contestant, run in zip(contestants, runs, strict=True):
        trainable = sum(parameter.numel() for parameter in contestant.trained())
        step, speed = f"{1e3 * run.step_time:.1f}", f"{run.tokens_per_second:,.0f}"
        rows.append([run.name, f"{len(run.seconds):,}", step, speed, f"{trainable:,}"])
    return report.aligned(rows)


def _bars(plan: Plan, scores: list[dict[str, float]], blind: dict[str, float], runs: list[Run]) -> bool:
    memory, prompt, guess = scores[0]["all"], scores[1]["all"], blind["all"]
    ratio = runs[0].step_time / runs[1].step_time
    bars = [
        (f"MemVP {memory:.1%}, wanted at least {plan.accuracy:.0%}", memory >= plan.accuracy),
        (
            f"without the image {guess:.1%}, wanted at least {100 * plan.above_blind:.0f} points less",
            memory >= guess + plan.above_blind,
        ),
        (f"step time {ratio:.2f}x the prompt's, wanted at most {plan.step_time}x", ratio <= plan.step_time),
    ]
    if plan.behind is not None:
        text = f"prompt {prompt:.1%}, wanted at most {100 * plan.behind:.0f} points above MemVP"
        bars.append((text, memory >= prompt - plan.behind))
    print()
    for text, met in bars:
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    return all(met for _, met in bars)


if __name__ == "__main__":
    sys.exit(main())
