"""The paper's training recipe, by transformers' Trainer: one process or many, and on again from the last epoch that was finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from memvp_kernels import MemVPModel
from memvp_kernels.models.trainer import MemVPTrainer
from science_questions.batches import Reader, TrainingRows
from science_questions.data import Problem

__all__ = ["Recipe", "train"]


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

    def arguments(self, folder: Path, problems: int, processes: int, *, cpu: bool) -> TrainingArguments:
        """As Trainer takes them: learning rate 9e-3 · batch / 256, linear warm-up, cosine, no decay of biases, no clipping."""
        batches = problems // processes // self.rows
        return TrainingArguments(
            output_dir=str(folder),
            use_cpu=cpu,
            num_train_epochs=self.epochs,
            warmup_steps=self.warmup * math.ceil(batches / self.accumulate),
            lr_scheduler_type="cosine",
            learning_rate=9e-3 * self.rows * self.accumulate * processes / 256,
            adam_beta2=0.95,
            weight_decay=0.02,
            max_grad_norm=0.0,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.accumulate,
            dataloader_drop_last=True,
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=not cpu,
            seed=self.seed,
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
        )


class _StopAfter(TrainerCallback):
    """Stops when an epoch is over; the learning rate still is that of all of them."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.epoch is not None and state.epoch >= self.epoch:
            control.should_training_stop = True


def train(
    model: MemVPModel,
    reader: Reader,
    problems: Sequence[Problem],
    recipe: Recipe,
    folder: Path,
    *,
    processes: int = 1,
    cpu: bool = False,
    until: int | None = None,
) -> list[float]:
    """Train, and leave the adapter in ``folder``; a folder with a checkpoint goes on from there.

    Args:
        model: untrained, or anything where the folder has a checkpoint.
        reader: makes rows of problems.
        problems: the training split.
        recipe: how.
        folder: of the adapter, and of the last epoch's checkpoint.
        processes: that train together.
        cpu: train there, whatever there is.
        until: stop after this epoch.

    Returns:
        The mean loss of each epoch.
    """
    trainer = MemVPTrainer(
        model,
        recipe.arguments(folder, len(problems), processes, cpu=cpu),
        train_dataset=TrainingRows(reader, problems),
        data_collator=reader.collate,
        callbacks=[_StopAfter(until)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    model.save_pretrained(folder)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
