"""TRL's trainers over a MemVPModel: supervised fine-tuning with images, and preferences whose reference is the model at the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels import MemVPModel
from tests.models.tiny import CONFIG, VISION, VOCABULARY, language_model, with_memory
from tests.models.tools import arguments, losses, tokenizer

for _needed in ("trl", "datasets"):
    pytest.importorskip(_needed, reason=f"{_needed} is not installed (pip install trl)")

STEPS, ROWS = 10, 4
COMMON: dict[str, Any] = {
    "bf16": False,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "remove_unused_columns": False,
}


def _rows(*columns: str) -> list[dict[str, Any]]:
    """Token ids per column, and an image of one to four visual tokens."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for row in range(ROWS):
        ids = {name: torch.randint(3, VOCABULARY, (3 + row % 2,), generator=generator).tolist() for name in columns}
        rows.append(ids | {"image_features": torch.randn(1 + row, VISION, generator=generator).tolist()})
    return rows


def _preferences() -> list[dict[str, Any]]:
    """The same as text, which DPOTrainer tokenizes itself."""
    names = ("prompt", "chosen", "rejected")
    return [row | {name: " ".join(f"w{i}" for i in row[name]) + " " for name in names} for row in _rows(*names)]


def _images(rows: list[dict[str, Any]], copies: int = 1) -> dict[str, Any]:
    return {"image_features": [torch.tensor(row["image_features"]) for row in rows] * copies}


def _collate_sft(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=0)(rows) | _images(rows)


def _collate_dpo(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The chosen answers, then the rejected ones, each beside its row's image."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(rows) | _images(rows, 2)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _step_by_hand(model: MemVPModel, loss: Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter -= COMMON["learning_rate"] * parameter.grad  # type: ignore[operator]
            parameter.grad = None


def _seen(model: MemVPModel) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, batch: seen.append(batch), with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sft(family: str, tmp_path: Path) -> None:
    """Ten steps lose what `model(**batch).loss` gives, step for step."""
    import trl

    model, by_hand = with_memory(language_model(family)), with_memory(language_model(family))
    args = arguments(tmp_path, trl.SFTConfig, max_length=None, gradient_checkpointing=family == "gemma2", **COMMON)
    options = {"processing_class": tokenizer(), "data_collator": _collate_sft}
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=_dataset(_rows("input_ids")), **options)
    seen = _seen(model)
    trainer.train()
    assert len(losses(trainer)) == STEPS
    for batch, loss in zip(seen, losses(trainer), strict=True):
        batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "image_features")}
        wanted = by_hand(**batch).loss
        assert loss == pytest.approx(wanted.item(), rel=1e-4)
        _step_by_hand(by_hand, wanted)
    torch.testing.assert_close(model.key_position, by_hand.key_position, rtol=1e-3, atol=1e-5)


def _answer_log_probs(model: Any, batch: dict[str, Any]) -> Tensor:
    """Of the chosen answers, then of the rejected ones."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image_features") if name in batch}
    log_p = F.log_softmax(model(**inputs).logits[:, :-1], dim=-1)
    own = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (own * batch["completion_mask"][:, 1:]).sum(dim=1)


@pytest.mark.parametrize("reference", ["the model at the start", "the language model"])
def test_dpo(reference: str, tmp_path: Path) -> None:
    """The memory's dropout is turned off as any other, or the policy would differ from a reference that is itself."""
    import trl

    config = dataclasses.replace(CONFIG, dropout=0.5)
    model, by_hand = with_memory(language_model(), config), with_memory(language_model())
    start, beta = with_memory(language_model()), 0.3
    at_start = reference == "the model at the start"
    args = arguments(
        tmp_path,
        trl.DPOConfig,
        max_length=None,
        beta=beta,
        gradient_checkpointing=False,
        precompute_ref_log_probs=at_start,
        **COMMON,
    )
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if at_start else model.language_model,
        args=args,
        train_dataset=_dataset(_preferences()),
        processing_class=tokenizer(),
        data_collator=_collate_dpo,
    )
    batches: list[dict[str, Any]] = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *a, **k: (
        batches.append(dict(inputs)),
        compute(model, inputs, *a, **k),
    )[1]
    trainer.train()
    assert len(losses(trainer)) == len(batches) == STEPS
    for batch, loss in zip(batches, losses(trainer), strict=True):
        with torch.no_grad():
            text = {name: value for name, value in batch.items() if name != "image_features"}
            chosen, rejected = _answer_log_probs(
                start if at_start else language_model(), batch if at_start else text
            ).chunk(2)
        own_chosen, own_rejected = _answer_log_probs(by_hand, batch).chunk(2)
        wanted = -F.logsigmoid(beta * ((own_chosen - own_rejected) - (chosen - rejected))).mean()
        assert loss == pytest.approx(wanted.item(), rel=1e-4)
        _step_by_hand(by_hand, wanted)
    torch.testing.assert_close(model.key_position, by_hand.key_position, rtol=1e-3, atol=1e-5)
