"""What the tests of other libraries' tools share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version

from tests.models.tiny import VOCABULARY


def tokenizer(**special: str) -> Any:
    """Words w0 to w39, whose ids are their numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2"} | special
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def row(ids: torch.Tensor, image: torch.Tensor | None) -> dict[str, Any]:
    """One of a Trainer's data set: ids that are their own labels, and an image."""
    return {"input_ids": ids, "labels": ids, "image_features": image}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of one length, and a list of their images."""
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"image_features": [row["image_features"] for row in rows]}


def arguments(folder: Path | str, kind: Any = tf.TrainingArguments, **options: Any) -> Any:
    """A Trainer's, on a CPU, silent; nothing is saved unless it is asked for."""
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return kind(output_dir=str(folder), **common | options)


def losses(trainer: Any) -> list[float]:
    """Those that it has logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def without_dropout(base: Any) -> Any:
    """T5's and BART's would differ from run to run."""
    for module in base.modules():
        for name in ("p", "dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return base


def train_without_dropout(model: Any) -> Any:
    """In training mode, where transformers checkpoints, but for every dropout."""
    for module in without_dropout(model).modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    return model


def fails_before(*, transformers: str = "0", torch_: str = "0") -> pytest.MarkDecorator:
    """Skips where an older transformers or PyTorch itself, without this package, can't do what is tested."""
    old = Version(tf.__version__) < Version(transformers) or Version(torch.__version__) < Version(torch_)
    return pytest.mark.skipif(old, reason=f"needs transformers {transformers} and PyTorch {torch_}")
