"""Batches that a loader has cut without knowing what a list of images is."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["refuse_cut_images"]


def refuse_cut_images(model: nn.Module, **images: Any) -> None:
    """Refuse what a loader has cut: it slices every tensor of a batch by rows, those inside a list and an index as well.

    Args:
        model: the MemVPModel, or nn.DataParallel's replica of it.
        **images: a forward's images and ``visual_index``; a tensor with one row per sample survives the cut.

    Raises:
        ValueError: one of them is not such a tensor.
    """
    given = [name for name, value in images.items() if value is not None]
    lists = [name for name in given if name == "visual_index" or not isinstance(images[name], Tensor)]
    if not lists:
        return
    names = " and ".join(lists)
    if getattr(model, "_is_replica", False):
        raise ValueError(
            f"{names}: nn.DataParallel cuts the tensors inside a list, and an index, by rows; pass a tensor with one row "
            "per sample, or start one process per GPU (torchrun, accelerate launch)"
        )
    if not torch.compiler.is_compiling() and _dispatched():
        raise ValueError(
            f"{names}: accelerate's dispatching loader cuts the tensors inside a list, and an index, by rows; pass a "
            "tensor with one row per sample, let every process read the data (dispatch_batches=False in "
            "Accelerator's DataLoaderConfiguration or in TrainingArguments' accelerator_config), or use MemVPTrainer"
        )


def _dispatched() -> bool:
    """Whether the batch of this moment was read by one process and sent to the others in slices."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state or state.PartialState().num_processes == 1:
        return False
    loader = state.GradientState().active_dataloader
    # Trainer fetches all batches of an update first: past the end of an epoch its loader is no longer the active one
    loaders = gc.get_objects() if loader is None else [loader]
    return any(type(found).__name__ == "DataLoaderDispatcher" for found in loaders)
