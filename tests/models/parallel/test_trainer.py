"""transformers' Trainer over a MemVPModel: one process and two lose alike, resume to the same, and save the adapter alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels.models.trainer import MemVPTrainer
from tests import tolerance
from tests.models.parallel.processes import Group, free_port, meet
from tests.models.parallel.test_data_parallel import laid_out
from tests.models.parallel.tiny import batch, language_model, memvp_model
from tests.models.tiny import shuffled
from tests.models.tools import arguments, fails_before, losses, row

STEPS = 5


def _samples() -> list[dict[str, Any]]:
    """Questions about images."""
    inputs = batch(samples=20)
    return list(map(row, inputs["input_ids"], inputs["image_features"]))


@pytest.fixture(scope="module")
def bare() -> Iterator[dict[int, Group]]:
    """One and two ranks that accelerate introduces to each other."""
    groups = {1: Group(1, meet=False), 2: Group(2, meet=False)}
    yield groups
    for group in groups.values():
        group.stop()


def _train(
    port: int,
    folder: str,
    steps: int,
    resume: bool,
    lora: bool,
    checkpointing: bool,
    order: int | None = None,
    exact: bool = False,
) -> tuple[list[float], dict[str, Tensor]]:
    meet(port)
    base = language_model() if order is None else shuffled(language_model(), order)
    if exact:
        base = base.to(torch.float64)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(4)
        base = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_dropout=0.0))
    parts = 1 if order is None else 2
    args = arguments(
        folder,
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]) // parts,
        gradient_accumulation_steps=parts,
        max_steps=steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        seed=1,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer = MemVPTrainer(model=memvp_model(base), args=args, train_dataset=_samples())
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return losses(trainer), trained


def _run(bare: dict[int, Group], ranks: int, folder: Path, *options: Any) -> tuple[list[float], dict[str, Tensor]]:
    answers: list[tuple[list[float], dict[str, Tensor]]] = bare[ranks].run(_train, free_port(), str(folder), *options)
    for name, tensor in answers[0][1].items():
        assert all(torch.equal(tensor, trained[name]) for _, trained in answers), f"{name} differs between ranks"
    return answers[0]


def test_two_processes_lose_like_one(bare: dict[int, Group], tmp_path: Path) -> None:
    together, _ = _run(bare, 2, tmp_path / "two", STEPS, False, False, True)
    assert len(together) == STEPS
    # float32's own error: of one process that adds up the two halves of a batch, with the sums over the FFNs' pairs in four orders.
    exact, *orders = (
        torch.tensor(
            _run(bare, 1, tmp_path / str(order), STEPS, False, False, True, order, order is None)[0],
            dtype=torch.float64,
        )
        for order in (None, *range(4))
    )
    tolerance.assert_within_twice(torch.tensor(together), exact, orders, "losses")


@fails_before(torch_="2.13")
@pytest.mark.parametrize(("ranks", "lora"), [(1, False), (2, True)], ids=["memory", "memory and LoRA"])
def test_a_resumed_run_is_the_uninterrupted_one(bare: dict[int, Group], tmp_path: Path, ranks: int, lora: bool) -> None:
    whole, wanted = _run(bare, ranks, tmp_path, STEPS, False, lora, False)
    resumed, found = _run(bare, ranks, tmp_path, STEPS, True, lora, False)
    assert resumed[-2:] == whole[-2:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert any("lora" in name for name in wanted) == lora
    files = {p.name: p.stat().st_size for p in (tmp_path / "checkpoint-3").iterdir()}
    assert "memvp_model.safetensors" in files
    base = sum(p.nbytes for p in language_model().parameters())
    assert sum(size for name, size in files.items() if name.endswith(".safetensors")) < base / 4


def _save_sharded(port: int, folder: str) -> dict[str, Tensor]:
    """A sharded model, saved by all ranks from what they hold, and by the first alone from what FSDP has gathered for it."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    meet(port)
    args = arguments(folder, save_strategy="steps", ddp_timeout=15)
    assert dist.get_world_size() == 2
    model, _ = laid_out("fsdp2-root")
    trainer = MemVPTrainer(model=model, args=args, train_dataset=_samples())
    trainer.save_model(f"{folder}/all")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        trainer._save(f"{folder}/first", state)
    dist.barrier()
    return model.adapter_state_dict()


@fails_before(torch_="2.13")
def test_a_sharded_model_is_saved_whole(bare: dict[int, Group], tmp_path: Path) -> None:
    """To gather within a save that only the first process makes would be to wait for the others for ever."""
    from safetensors.torch import load_file

    wanted = bare[2].run(_save_sharded, free_port(), str(tmp_path))[0]
    for folder in ("all", "first"):
        state = load_file(tmp_path / folder / "memvp_model.safetensors")
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], t) for name, t in wanted.items())
        trained = load_file(tmp_path / folder / "model.safetensors")
        assert trained.keys() == {f"memory.{name}" for name in wanted}
