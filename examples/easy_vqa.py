"""Three ways to show an image, raced on a public data set: MemVP, ADEM-VL, and visual tokens in the prompt, on easy-VQA.

    python examples/easy_vqa.py              # under 20 minutes on two CPU cores
    python examples/easy_vqa.py --quick      # under 40 seconds
    python examples/easy_vqa.py --tune       # the settings, each tried on held-out training images

A tiny LLaMA is taught easy-VQA's questions from descriptions in words, and frozen; it never sees an image. Then each method
trains the same number of steps on the same patches and questions, with three seeds, the methods' steps taking turns. The
settings were chosen on 500 training images held out; the published test split is asked about once, at the end. Every kind
of question is reported by itself, beside the majority answer to each question's text and the image withheld.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_vqa import language_model, results, shapes
from tiny_vqa.methods import InMemory, InPrompt, Method
from tiny_vqa.text import Asked, Question, Vocabulary, batch
from tiny_vqa.training import Run, reply, train
from transformers import PreTrainedModel

from memvp_kernels import MemVPConfig

TOKENS, VISION_DIM, PROJECTOR_DIM = shapes.GRID**2, 3 * shapes.PATCH**2, 64
WIDTH, LAYERS, WINDOW = 64, 4, 2
ROWS = 16
MEMORY_LAYERS = (0,)
SIZES: dict[str, Any] = {
    "vision_dim": VISION_DIM,
    "projector_dim": PROJECTOR_DIM,
    "dropout": 0.0,
    "shared_positions": False,
}


class Setting(NamedTuple):
    """What is tuned, with as many trials for each method.

    Attributes:
        learning_rate: the highest.
        share: at the start, of the memory in an FFN's output; for the prompt, a visual token's size in a word's.
    """

    learning_rate: float
    share: float


GRID = [Setting(rate, share) for rate, share in itertools.product((2e-3, 5e-3), (0.02, 0.1, 0.4))]


class Recipe(NamedTuple):
    """A method: how it is made on a language model, and the setting that `--tune` found best for it."""

    make: Callable[[PreTrainedModel, Vocabulary], Method]
    setting: Setting


def _memvp(base: PreTrainedModel, words: Vocabulary) -> Method:
    config = MemVPConfig(num_slots=TOKENS + 8, layers=MEMORY_LAYERS, **SIZES)
    return InMemory("MemVP", base, config)


def _prompt(base: PreTrainedModel, words: Vocabulary) -> Method:
    return InPrompt(base, words, tokens=TOKENS, vision_dim=VISION_DIM, projector_dim=PROJECTOR_DIM)


def _adem_vl(base: PreTrainedModel, words: Vocabulary) -> Method:
    config = MemVPConfig.adem_vl(pooled_grids=(TOKENS, TOKENS // 4), layers=MEMORY_LAYERS, **SIZES)
    return InMemory("ADEM-VL", base, config)


METHODS = {
    "MemVP": Recipe(_memvp, Setting(2e-3, 0.1)),
    "ADEM-VL": Recipe(_adem_vl, Setting(5e-3, 0.02)),
    "tokens in the prompt": Recipe(_prompt, Setting(5e-3, 0.1)),
}


class Plan(NamedTuple):
    """How long to train.

    Attributes:
        text_steps: of the language model.
        image_steps: of each method, per seed.
        seeds: of the methods' parameters and of the order of the questions.
        looks: how often to look at held-out training images on the way.
        watched: how many questions of a look.
        asked: how many of the test split; None: all.
    """

    text_steps: int
    image_steps: int
    seeds: int
    looks: int
    watched: int
    asked: int | None


FULL = Plan(900, 5000, seeds=3, looks=6, watched=400, asked=None)
QUICK = Plan(40, 12, seeds=1, looks=2, watched=60, asked=200)
TUNING = Plan(900, 2000, seeds=1, looks=4, watched=1000, asked=None)


def taught(words: Vocabulary, steps: int, path: Path) -> PreTrainedModel:
    """The frozen language model; from the file where an earlier run has left it."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model = language_model.build(
        words, width=WIDTH, layers=LAYERS, window=WINDOW, initializer_range=0.1, tie_word_embeddings=True
    )
    if path.exists():
        model.load_state_dict(torch.load(path))
    else:
        language_model.teach(
            model, words, lambda done: shapes.lesson(rng, done), steps=steps, learning_rate=2e-3, noise=0.4
        )
        torch.save(model.state_dict(), path)
    return model.eval()


def prepared(
    name: str, setting: Setting, base: PreTrainedModel, words: Vocabulary, known: shapes.Shapes, seed: int
) -> Method:
    """A method on its own copy of the language model, calibrated on the first training questions."""
    torch.manual_seed(seed)
    method = METHODS[name].make(copy.deepcopy(base), words)
    first = next(shapes.batches(known, rows=64, seed=seed))
    questions = batch(words, first.questions, answered=False, places=method.places)
    print(
        f"{name}, seed {seed}: {method.calibrate(known.features[first.rows], questions, setting.share)}\n", flush=True
    )
    return method


class Raced(NamedTuple):
    """What came of one seed, in the order of METHODS.

    Attributes:
        runs: how each method trained.
        answers: of each to the test questions.
        blind: MemVP's, without the images.
        trained: how many parameters of each method train.
    """

    runs: list[Run]
    answers: list[list[str]]
    blind: list[str]
    trained: list[int]


def race(seed: int, plan: Plan, path: Path) -> Raced:
    """Train every method with its own setting, on the same questions in the same order; then ask the test questions."""
    torch.set_num_threads(1)
    words = shapes.vocabulary()
    known, watched = shapes.held_out(shapes.load("train"))
    base = taught(words, plan.text_steps, path)
    methods = [prepared(name, one.setting, base, words, known, seed) for name, one in METHODS.items()]
    runs = train(
        methods,
        words,
        known.features,
        shapes.batches(known, rows=ROWS, seed=seed),
        steps=plan.image_steps,
        learning_rates=[one.setting.learning_rate for one in METHODS.values()],
        held_out=(watched.features, first(watched.asked, plan.watched)),
        looks=plan.looks,
    )
    test = shapes.load("test")
    asked = first(test.asked, plan.asked)
    return Raced(
        runs,
        [reply(method, words, test.features, asked) for method in methods],
        reply(methods[0], words, test.features, asked, blind=True),
        [sum(p.numel() for p in method.trained()) for method in methods],
    )


def first(asked: Asked, count: int | None) -> Asked:
    """So many of the questions, spread over all images; None: all."""
    chosen = slice(None, None, max(1, len(asked.rows) // count)) if count else slice(None)
    return Asked(asked.questions[chosen][:count], asked.rows[chosen][:count])


def tune(base: PreTrainedModel, words: Vocabulary, known: shapes.Shapes, watched: shapes.Shapes) -> None:
    """Print what each method gets on held-out training images with each setting of the same grid."""
    held_out = (watched.features, first(watched.asked, TUNING.watched))
    for name, setting in itertools.product(METHODS, GRID):
        method = prepared(name, setting, base, words, known, seed=10)
        train(
            [method],
            words,
            known.features,
            shapes.batches(known, rows=ROWS, seed=10),
            steps=TUNING.image_steps,
            learning_rates=[setting.learning_rate],
            held_out=held_out,
            looks=1,
        )
        right = results.score(held_out[1], reply(method, words, *held_out))
        print(f"{name}, {setting}: {said(right)}", flush=True)


def said(right: results.Score) -> str:
    """Shares of right answers in a line."""
    return ", ".join(f"{kind} {share:.1%}" for kind, share in right.items())


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, for continuous integration")
    parser.add_argument("--tune", action="store_true", help="try the settings on held-out training images, and end")
    parser.add_argument(
        "--out", type=Path, default=Path("out/easy_vqa"), help="folder of the files (default: out/easy_vqa)"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, commit = time.perf_counter(), results.checked_out()

    words, path = shapes.vocabulary(), arguments.out / f"language_model_{plan.text_steps}.pt"
    known, watched = shapes.held_out(shapes.load("train"))
    base = taught(words, plan.text_steps, path)
    told = shapes.lesson(random.Random(1), 1.0, rows=500)
    print(
        f"the language model, of descriptions in words: {said(results.score(Asked(told, []), say(base, words, told)))}\n"
    )
    if arguments.tune:
        tune(base, words, known, watched)
        return 0

    # a process of one thread per seed: these models are too small for two threads to be much faster than one
    with ProcessPoolExecutor(min(plan.seeds, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        races = list(pool.map(race, range(plan.seeds), itertools.repeat(plan), itertools.repeat(path)))
    test = shapes.load("test")
    asked = first(test.asked, plan.asked)
    rows = [
        results.row(
            name,
            [results.score(asked, one.answers[i]) for one in races],
            [one.runs[i] for one in races],
            races[0].trained[i],
        )
        for i, name in enumerate(METHODS)
    ]
    rows.append(results.row("MemVP, image withheld", [results.score(asked, one.blind) for one in races]))
    guess = shapes.majority(known.asked.questions, asked.questions)
    rows.append(results.row("each text's majority answer", [results.score(asked, guess)]))
    found = results.record(rows, seconds=time.perf_counter() - started, commit=commit)
    (arguments.out / "easy_vqa.json").write_text(json.dumps(found, indent=2) + "\n")

    results.draw_curves([one.runs for one in races], arguments.out / "curves.png")
    shown = [asked.rows.index(image) + image % 3 for image in sorted(set(asked.rows))[:18]]
    results.draw_answers(test.pixels, asked, races[0].answers[0], shown, arguments.out / "answers.png")
    print(f"\n{len(asked.rows)} questions of the test split; {results.markdown(found)}\n\n{results.by_kind(found)}")
    print(f"\neasy_vqa.json, curves.png and answers.png are in {arguments.out}/\n")
    return 0 if arguments.quick or met(found) else 1


def say(base: PreTrainedModel, words: Vocabulary, told: list[Question]) -> list[str]:
    """The language model's own answers to questions about text."""
    asked = batch(words, told, answered=False)
    with torch.no_grad():
        likeliest = base(input_ids=asked.input_ids, attention_mask=asked.attention_mask).logits[:, -1].argmax(dim=-1)
    return [words.words[i] for i in likeliest.tolist()]


def met(found: dict[str, Any]) -> bool:
    """Print whether MemVP, level with the prompt, is well above guessing at every kind of question."""
    memory, prompt, guess = (
        next(row for row in found["rows"] if row["name"] == name)
        for name in ("MemVP", "tokens in the prompt", "each text's majority answer")
    )
    wanted = [(kind, memory["right"][kind] >= share + 0.1) for kind, share in guess["right"].items()]
    for kind, ok in wanted:
        print(f"{'met   ' if ok else 'MISSED'}  {kind}: MemVP at least 10 points above the majority answer")
    level = memory["right"]["all"] >= prompt["right"]["all"] - 0.02
    print(f"{'met   ' if level else 'MISSED'}  MemVP at most 2 points under the prompt")
    return level and all(ok for _, ok in wanted)


if __name__ == "__main__":
    sys.exit(main())
