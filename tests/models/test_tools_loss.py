"""The loss that a Trainer computes, logs and trains on is `model(**batch).loss`: every family, label smoothing, accumulation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from memvp_kernels.models.trainer import MemVPTrainer
from tests.models.tiny import ENCODER_DECODERS, KINDS, features, language_model, tokens, with_memory
from tests.models.tools import arguments, collate, without_dropout

TRAINERS = ["Trainer", "MemVPTrainer"]
ROWS, LENGTH = 4, 6


def _rows() -> list[dict[str, Any]]:
    """Rows with 6, 1, 4 and 0 labels that count, the first one's first label among them."""
    ids = tokens(ROWS, LENGTH)
    labels = ids.clone()
    for row, ignored in enumerate([0, 5, 2, 6]):
        labels[row, :ignored] = -100
    return [
        {"input_ids": ids[row], "labels": labels[row], "image_features": image}
        for row, image in enumerate(features(4, 0, 10, 3))
    ]


def _trainer(kind: str, model: Any, folder: Path, **options: Any) -> Any:
    cls = MemVPTrainer if kind == "MemVPTrainer" else transformers.Trainer
    rows: Any = _rows()
    return cls(
        model=model, args=arguments(folder, **options), train_dataset=rows, eval_dataset=rows, data_collator=collate
    )


def _smoothed(model: Any, batch: dict[str, Any], epsilon: float) -> Tensor:
    """The mean over the labels that count of (1 - ε) CE + ε · mean over the vocabulary of -log p."""
    with torch.no_grad():
        logits, labels = model(**batch).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_p = F.log_softmax(logits, dim=-1)
    count = labels != -100
    own = -log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0][count].mean()
    return (1 - epsilon) * own - epsilon * log_p[count].mean()


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("family", KINDS)
def test_evaluation(family: str, kind: str, tmp_path: Path) -> None:
    """The first label is not masked, which a causal model does not predict."""
    model = with_memory(language_model(family))
    wanted = model(**collate(_rows())).loss.item()
    got = _trainer(kind, model, tmp_path).evaluate()["eval_loss"]
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("family", KINDS)
def test_label_smoothing(family: str, kind: str, tmp_path: Path) -> None:
    model = with_memory(language_model(family))
    batch = collate(_rows())
    trainer = _trainer(kind, model, tmp_path, label_smoothing_factor=0.2)

    if kind == "Trainer" and family in ENCODER_DECODERS:  # which withholds the labels and asks for these instead
        ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        trainer.data_collator = lambda rows: collate(rows) | {"decoder_input_ids": ids}
    assert trainer.evaluate()["eval_loss"] == pytest.approx(_smoothed(model, batch, 0.2).item(), rel=1e-5)


def test_label_smoothing_over_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = peft.get_peft_model(language_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = with_memory(base)
    got = _trainer("Trainer", model, tmp_path, label_smoothing_factor=0.2).evaluate()["eval_loss"]
    assert got == pytest.approx(_smoothed(model, collate(_rows()), 0.2).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "smoothing"), [("Trainer", 0.0), ("MemVPTrainer", 0.0), ("MemVPTrainer", 0.2)])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_accumulated_steps_are_one_batch(family: str, kind: str, smoothing: float, tmp_path: Path) -> None:
    """One row at a time, with unequal numbers of labels and one row without any: loss and step of all rows at once."""
    base = without_dropout(language_model(family))
    runs = []
    for size in (ROWS, 1):
        model = with_memory(copy.deepcopy(base))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size, "max_steps": 1}
        options |= {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "logging_steps": 1}
        trainer = _trainer(kind, model, tmp_path, label_smoothing_factor=smoothing, **options)
        trainer.train()
        runs.append((trainer.state.log_history[0]["loss"], model.adapter_state_dict()))
    (loss, whole), (accumulated, parts) = runs
    fresh = with_memory(copy.deepcopy(base))
    wanted = _smoothed(fresh, collate(_rows()), smoothing) if smoothing else fresh(**collate(_rows())).loss
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert accumulated == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_loss_per_item_as_a_tuple(family: str) -> None:
    model, batch = with_memory(language_model(family)), collate(_rows())
    mean, count = model(**batch).loss, (batch["labels"] != -100).sum()
    loss, logits = model(**batch, return_dict=False, num_items_in_batch=torch.tensor(22))[:2]
    torch.testing.assert_close(loss, mean * count / 22)
    assert torch.equal(logits, model(**batch).logits)
