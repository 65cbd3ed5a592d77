"""The training loop: one process or many, an epoch at a time, and on again from the last one that was finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from memvp_kernels import MemVPModel
from science_questions.batches import Reader, training_batches
from science_questions.data import Problem
from science_questions.recipe import learning_rate, optimiser, peak_learning_rate

__all__ = ["Recipe", "train"]

STATE = "last.pt"


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's.

    Attributes:
        epochs: in all, with the warm-up.
        warmup: epochs of it.
        rows: per process and step.
        accumulate: steps per update.
        seed: of the order of problems and of dropout.
        workers: processes that read images, per training process.
    """

    epochs: int = 20
    warmup: int = 2
    rows: int = 4
    accumulate: int = 1
    seed: int = 0
    workers: int = 4


def train(
    accelerator: Accelerator,
    model: MemVPModel,
    reader: Reader,
    problems: Sequence[Problem],
    recipe: Recipe,
    folder: Path,
    *,
    until: int | None = None,
) -> list[float]:
    """Train, and leave the adapter and the optimiser's state in ``folder`` after every epoch.

    A folder with such a state goes on from there, to the same bits as without the interruption.

    Args:
        accelerator: one process, or those that torchrun or accelerate launched.
        model: on the accelerator's device.
        reader: makes rows of problems.
        problems: the training split.
        recipe: how.
        folder: of the adapter, ``last.pt`` and ``log.jsonl``.
        until: stop after this epoch; the learning rate still is that of all of them.

    Returns:
        The mean loss of each epoch run, over all processes' steps.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    loader, sampler = training_batches(
        reader, problems, rows=recipe.rows, rank=rank, world=world, workers=recipe.workers, seed=recipe.seed
    )
    peak = peak_learning_rate(recipe.rows * recipe.accumulate * world)
    adam = optimiser(model)
    first = _resume(folder, model, adam)
    wrapped = accelerator.prepare_model(model)
    losses: list[float] = []
    for epoch in range(first, recipe.epochs if until is None else min(until, recipe.epochs)):
        sampler.set_epoch(epoch)
        torch.manual_seed(recipe.seed + epoch * world + rank)  # so that dropout is the same after an interruption
        wrapped.train()
        total = 0.0
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=rank != 0, mininterval=1)
        for step, batch in enumerate(bar):
            if step % recipe.accumulate == 0:
                rate = learning_rate(epoch + step / len(loader), peak=peak, epochs=recipe.epochs, warmup=recipe.warmup)
                for group in adam.param_groups:
                    group["lr"] = rate
            last = (step + 1) % recipe.accumulate == 0 or step + 1 == len(loader)
            with nullcontext() if last else accelerator.no_sync(wrapped):
                loss = wrapped(**_on(batch, accelerator.device)).loss
                (loss / recipe.accumulate).backward()
            if last:
                adam.step()
                adam.zero_grad()
            total += loss.item()
            bar.set_postfix(loss=f"{total / (step + 1):.4f}", lr=f"{rate:.2e}", refresh=False)
        mean = torch.tensor(total / len(loader), device=accelerator.device)
        losses.append(float(accelerator.reduce(mean, "mean")))
        if accelerator.is_main_process:
            _save(folder, model, adam, epoch, losses[-1])
        accelerator.wait_for_everyone()
    return losses


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved: dict[str, Any] = {k: v.to(device) for k, v in batch.items() if k != "pixel_values"}
    moved["pixel_values"] = [None if image is None else image.to(device) for image in batch["pixel_values"]]
    return moved


def _resume(folder: Path, model: MemVPModel, adam: torch.optim.Optimizer) -> int:
    """The epoch to go on with."""
    if not (folder / STATE).is_file():
        return 0
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    model.load_adapter_state_dict(state["adapter"])
    adam.load_state_dict(state["optimizer"])
    return int(state["epoch"]) + 1


def _save(folder: Path, model: MemVPModel, adam: torch.optim.Optimizer, epoch: int, loss: float) -> None:
    """The state under another name first: an interruption while writing costs this epoch and not all of them."""
    model.save_pretrained(folder)
    state = {"adapter": model.adapter_state_dict(), "optimizer": adam.state_dict(), "epoch": epoch}
    torch.save(state, folder / f"{STATE}.new")
    (folder / f"{STATE}.new").replace(folder / STATE)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"epoch": epoch, "loss": loss}) + "\n")
