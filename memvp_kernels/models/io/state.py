"""What trains, out of any layout and into any other: full tensors for a file, sharded ones for a distributed checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdapterState", "assign", "full_tensor"]

_PLAIN = (Tensor, nn.Parameter)


def full_tensor(t: Tensor) -> Tensor:
    """``t`` in full where it is sharded; then every rank must call this."""
    if type(t) in _PLAIN:
        return t
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


def assign(t: Tensor, value: Tensor) -> None:
    """Copy ``value``, in full, into ``t``, of which this rank may hold a part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        if isinstance(t, DTensor):
            value = distribute_tensor(value.to(t.device, t.dtype), t.device_mesh, t.placements, src_data_rank=None)
        t.copy_(value)


class AdapterState:
    """A model's trainable parameters, and their optimizer's state, as :mod:`torch.distributed.checkpoint` takes them.

    ::

        dcp.save({"adapter": AdapterState(model, optimizer)}, checkpoint_id=folder)
        dcp.load({"adapter": AdapterState(model, optimizer)}, checkpoint_id=folder)

    on every rank. The frozen base is not in it, and names are those of the bare model, so that what DDP saved can be loaded
    under FSDP2, tensor parallelism or in one process, and the other way round. LoRA matrices that train beside the memory are
    in it, too.

    Args:
        model: a MemVPModel, or what wraps one.
        optimizer: over the model's trainable parameters and no others; None: parameters alone.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimizer state by name, sharded as they are."""
        from torch.distributed.checkpoint import state_dict as checkpoint

        options = checkpoint.StateDictOptions(ignore_frozen_params=True)
        state: dict[str, Any] = {"model": checkpoint.get_model_state_dict(self.model, options=options)}
        if self.optimizer is not None:
            state["optimizer"] = checkpoint.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        from torch.distributed.checkpoint import state_dict as checkpoint

        options = checkpoint.StateDictOptions(ignore_frozen_params=True, strict=False)  # the base's names are missing
        checkpoint.set_model_state_dict(self.model, state["model"], options=options)
        if self.optimizer is not None:
            checkpoint.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
