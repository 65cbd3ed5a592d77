"""The paper's own run: MemVP on ScienceQA, for those who have the data and the weights.

    python examples/scienceqa.py train    --data data --language-model LLAMA --vision-model CLIP --out runs/7b
    python examples/scienceqa.py evaluate --data data --language-model LLAMA --vision-model CLIP --adapter runs/7b

LLAMA and CLIP are transformers models: folders, or names on the hub (openai/clip-vit-large-patch14 is the paper's CLIP).
``data`` has the official layout: problems.json, pid_splits.json, captions.json, images/<split>/<id>/image.png. Several
GPUs: put ``torchrun --nproc_per_node 8`` or ``accelerate launch`` in the place of ``python``; the paper's batch of 32 is
8 processes of ``--rows 4``. A stopped run continues when called again. ``--adapter`` also takes an official ``.pth``.

The recipe is the paper's: AdamW (0.9, 0.95), learning rate 9e-3 * batch / 256, weight decay 0.02 but for biases, 2 epochs
of warm-up and 18 of a cosine, loss on the answer alone, prompt QCM-A. Image captions are in the prompt or not, alike in
training and evaluation: evaluation reads from the adapter's folder which it was.

``--method adem-vl`` trains ADEM-VL by the same recipe, which is its paper's too: 256 patches and their 64 averages, no dropout
in the memory, and "Image: " with the class token behind BOS ("Image: N/A" where there is no image).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from science_questions import data, evaluation, score, setup, training

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do it."""
    given = _parser().parse_args(arguments)
    parts = setup.Parts(given.language_model, given.vision_model, DTYPES[given.dtype], given.limit)
    if given.command == "train":
        _train(given, parts)
    else:
        _evaluate(given, parts, Accelerator(cpu=given.cpu))
    return 0


def _train(given: argparse.Namespace, parts: setup.Parts) -> None:
    problems = data.load_split(given.data, given.split, captions=given.captions)
    state = PartialState(cpu=given.cpu)
    setup.agree_on_settings(state, given.out, captions=given.captions, num_slots=given.slots, method=given.method)
    torch.manual_seed(given.seed)
    model, reader = setup.new_adapter(parts, num_slots=given.slots, dropout=given.dropout, method=given.method)
    if state.is_main_process:
        model.print_trainable_parameters()
    recipe = training.Recipe(given.epochs, given.warmup, given.rows, given.accumulate, given.seed, given.workers)
    training.train(
        model, reader, problems, recipe, given.out, processes=state.num_processes, cpu=given.cpu, until=given.stop_after
    )


def _evaluate(given: argparse.Namespace, parts: setup.Parts, accelerator: Accelerator) -> None:
    model, reader, settings = setup.adapter_of(parts, given.adapter, method=given.method)
    if accelerator.is_main_process and "report" in settings:
        print(settings["report"])
    captions = settings["captions"] if given.captions is None else given.captions
    if captions is None:
        sys.exit("the checkpoint does not say whether it was trained with captions: pass --captions or --no-captions")
    problems = data.load_split(given.data, given.split, captions=captions)
    predictions = evaluation.predict(accelerator, model.to(accelerator.device), reader, problems, rows=given.rows)
    if not accelerator.is_main_process:
        return
    result = score.scores(problems, predictions)
    print(f"\n{len(problems)} questions of {given.split}, {'with' if captions else 'without'} captions\n")
    print(score.table(result))
    if given.predictions is not None:
        given.predictions.write_text(json.dumps({"predictions": predictions, "scores": result}, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an adapter, or go on training one")
    evaluate = commands.add_parser("evaluate", help="answer a split and print the official score table")
    for command, split, rows in ((train, "train", 4), (evaluate, "test", 64)):
        command.add_argument("--data", type=Path, required=True, help="folder in ScienceQA's official layout")
        command.add_argument("--language-model", required=True, help="transformers folder or name")
        command.add_argument("--vision-model", required=True, help="transformers folder or name of a CLIP vision model")
        command.add_argument("--method", choices=("memvp", "adem-vl"), default="memvp", help="to train, or of a .pth")
        command.add_argument("--split", default=split, help=f"a key of pid_splits.json (default: {split})")
        command.add_argument("--rows", type=int, default=rows, help=f"questions at once per process (default: {rows})")
        command.add_argument("--limit", type=int, default=512, help="most tokens of a row (default: 512)")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the frozen models")
        command.add_argument("--cpu", action="store_true", help="on the CPU, whatever there is")
    train.add_argument("--captions", action=argparse.BooleanOptionalAction, default=True, help="captions in the prompt")
    train.add_argument(
        "--out", type=Path, required=True, help="folder of the adapter; goes on from one that has a state"
    )
    train.add_argument("--slots", type=int, default=320, help="memory slots (paper: 320 for 7B, 400 for 13B)")
    train.add_argument(
        "--dropout", type=float, default=0.1, help="of visual activations and CLIP adapters (default: 0.1)"
    )
    train.add_argument("--epochs", type=int, default=20)
    train.add_argument("--warmup", type=int, default=2, help="epochs of it (default: 2)")
    train.add_argument("--accumulate", type=int, default=1, help="batches per update")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--workers", type=int, default=4, help="processes that read images, per training process")
    train.add_argument("--stop-after", type=int, default=None, metavar="EPOCH", help="stop then; call again to go on")
    evaluate.add_argument("--adapter", type=Path, required=True, help="folder that train wrote, or an official .pth")
    evaluate.add_argument(
        "--captions", action=argparse.BooleanOptionalAction, default=None, help="default: as it was trained"
    )
    evaluate.add_argument("--predictions", type=Path, help="JSON file for predictions and scores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
