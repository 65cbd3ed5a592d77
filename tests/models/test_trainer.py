"""MemVPTrainer: small checkpoints, a resumed run that is the uninterrupted one, tied embeddings, LoRA beside the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memvp_kernels import MemVPModel
from memvp_kernels.models.trainer import MemVPTrainer
from tests.models.tiny import CONFIG, features, language_model, tokens, with_memory
from tests.models.tools import arguments, collate, losses, row


def _options(folder: Path, **options: Any) -> dict[str, Any]:
    """What every Trainer here is built with; every third row has no image."""
    rows = [row(tokens(1, 5, seed=i)[0], features(0 if i % 3 == 2 else 4, seed=i)[0]) for i in range(12)]
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 4, "learning_rate": 0.05, "logging_steps": 1}
    args = arguments(folder, **{"save_strategy": "steps"} | settings | options)
    return {"args": args, "train_dataset": rows, "eval_dataset": rows, "data_collator": collate}


def _tied() -> MemVPModel:
    return with_memory(language_model("gemma").train())


def _run(model: MemVPModel, folder: Path, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    trainer = MemVPTrainer(model=model, **_options(folder, save_steps=5, **options))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_resuming_is_not_stopping(tmp_path: Path) -> None:
    whole = _tied()
    uninterrupted = _run(whole, tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    resumed = _tied()
    again = _run(resumed, tmp_path / "resumed", checkpoint)
    assert sorted(uninterrupted) == list(range(1, 13)) and {step: uninterrupted[step] for step in range(6, 13)} == {
        step: loss for step, loss in again.items() if step > 5
    }
    torch.testing.assert_close(whole.adapter_state_dict(), resumed.adapter_state_dict(), rtol=0, atol=0)


def test_a_checkpoint_holds_what_trains_and_loads_anywhere(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.get_peft_model(language_model(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    model = with_memory(lora)
    _run(model, tmp_path)
    state = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in state) and any(name.startswith("memory.") for name in state)
    again = MemVPModel.from_pretrained(language_model(), tmp_path / "checkpoint-12")
    torch.testing.assert_close(model.adapter_state_dict(), again.adapter_state_dict(), rtol=0, atol=0)


def test_what_the_user_froze_of_the_memory_is_in_the_folder(tmp_path: Path) -> None:
    model = _tied()
    model.projector.requires_grad_(False)
    _run(model, tmp_path, max_steps=5)
    again = MemVPModel.from_pretrained(language_model("gemma"), tmp_path / "checkpoint-5")
    assert torch.equal(model.projector.fc1.weight, again.projector.fc1.weight)
    assert torch.equal(model.key_position, again.key_position)


def test_the_best_model_comes_back(tmp_path: Path) -> None:
    model = _tied()
    _run(model, tmp_path, eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
    saved = [MemVPModel.from_pretrained(language_model("gemma"), folder) for folder in tmp_path.glob("checkpoint-*")]
    assert any(torch.equal(model.key_position, best.key_position) for best in saved)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _run(_tied(), tmp_path)
    weights = tmp_path / "checkpoint-5" / "model.safetensors"
    state = load_file(weights)
    state["memory.other"] = state.pop("memory.key_position")
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['memory\.key_position'\], unexpected \['memory\.other'\]"):
        _run(_tied(), tmp_path / "again", tmp_path / "checkpoint-5")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plain_trainer_trains(checkpointing: bool, tmp_path: Path) -> None:
    """The same steps as MemVPTrainer's, which differs in what it saves."""
    from transformers import Trainer

    runs = []
    for kind in (Trainer, MemVPTrainer):
        model = with_memory(language_model("llama", seed=1), CONFIG)
        frozen = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
        options = _options(tmp_path, save_strategy="no", gradient_checkpointing=checkpointing)
        trainer = kind(model=model, **options)
        trainer.train()
        runs.append(losses(trainer))
        assert trainer.evaluate()["eval_loss"] < runs[-1][0]
        torch.testing.assert_close(dict(model.language_model.state_dict()), frozen, rtol=0, atol=0)
    assert len(runs[0]) == 12 and runs[0] == runs[1]
