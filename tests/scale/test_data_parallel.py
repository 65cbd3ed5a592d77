"""DDP and FSDP2 over a frozen base: gradients equal one process's on the whole batch, whatever a rank's part of it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.scale.processes import Group
from tests.scale.tiny import Reference, adapter_gradients, batch, difference, language_model, memvp_model, reference

LAYOUTS = ("ddp", "ddp-static", "ddp-memory", "fsdp2-root", "fsdp2-own", "fsdp2-recipe")

#: Samples without an image: none, some on each rank, all of rank 1's.
TEXT_ONLY = {"images": (), "some": (1, 2), "rank 1 has none": (2, 3), "none at all": (0, 1, 2, 3)}


def laid_out(layout: str, **options: Any) -> tuple[Any, nn.Module]:
    """The MemVPModel, and what is called in its stead."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model: Any = memvp_model(**options)
    if layout == "ddp":
        return model, DistributedDataParallel(model)
    if layout == "ddp-static":
        return model, DistributedDataParallel(model, static_graph=True)
    if layout == "ddp-memory":
        model.memory = DistributedDataParallel(model.memory)
        return model, model
    for layer in model.language_model.model.layers:
        fully_shard(layer)
    if layout == "fsdp2-root":
        fully_shard(model)
    elif layout == "fsdp2-own":
        fully_shard(model.memory)
        fully_shard(model)
    else:
        fully_shard(model.language_model)
        model.memory = DistributedDataParallel(model.memory)
    return model, model


def part(inputs: dict[str, Any]) -> dict[str, Any]:
    """This rank's samples."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = len(inputs["input_ids"]) // world
    return {name: values[rank * count : (rank + 1) * count] for name, values in inputs.items()}


def whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors gathered."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def averaged(loss: torch.Tensor) -> torch.Tensor:
    """Of the ranks' losses, which have equally many tokens."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def _errors(layout: str, inputs: dict[str, Any], wanted: Reference, checkpointing: bool) -> dict[str, float]:
    model, entry = laid_out(layout)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = {}
    for _ in range(2):  # a second step, because a wrong first one often shows only then
        for parameter in model.memory.parameters():
            parameter.grad = None
        loss = entry(**part(inputs)).loss
        loss.backward()
        found = whole(adapter_gradients(model))
    assert all(p.grad is None for p in model.language_model.parameters())
    return wanted.errors(averaged(loss), found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("text_only", list(TEXT_ONLY))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(two: Group, layout: str, text_only: str, checkpointing: bool) -> None:
    """A rank without any image neither hangs nor fails: its zero cores pass every layer like any other."""
    inputs = batch(without=TEXT_ONLY[text_only])
    for errors in two.run(_errors, layout, inputs, _reference(text_only), checkpointing):
        assert max(errors.values()) < 1, errors


_REFERENCES: dict[str, Reference] = {}


def _reference(text_only: str) -> Reference:
    if text_only not in _REFERENCES:
        _REFERENCES[text_only] = reference(batch(without=TEXT_ONLY[text_only]))
    return _REFERENCES[text_only]
