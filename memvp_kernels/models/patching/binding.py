"""The memory that a layer gives to its FFN, for one forward of that layer and in the calling thread alone.

A layer binds inside its own forward, which is what activation checkpointing runs again, on whichever thread.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torch import Tensor

from memvp_kernels.models.memory.visual_memory import Memory

if TYPE_CHECKING:
    from memvp_kernels.models.patching.weights import Matrices, Opaque

__all__ = ["Binding", "bound", "swap"]


class Binding:
    """What one layer's FFN computes with.

    Attributes:
        memory: of the batch.
        index: (S,), the memory row of each sequence; None: sequence s reads row s.
        layer: position among the layers that have memory.
        used: an FFN has read it.
        weights, ffn_input: BART's, between the modules that make up its FFN.
    """

    __slots__ = ("ffn_input", "index", "layer", "memory", "used", "weights")

    def __init__(self, memory: Memory, index: Tensor | None, layer: int) -> None:
        self.memory = memory
        self.index = index
        self.layer = layer
        self.used = False
        self.weights: Matrices | Opaque | None = None
        self.ffn_input: Tensor | None = None


class _Local(threading.local):
    def __init__(self) -> None:  # runs in every thread; torch.compile guards on the attribute, so it must be there
        self.binding: Binding | None = None


_local = _Local()


def bound() -> Binding | None:
    """The binding of the layer that is running in this thread; None: no layer is, or one without memory."""
    return _local.binding


def swap(binding: Binding | None) -> Binding | None:
    """Bind, and return what was bound before."""
    before = _local.binding
    _local.binding = binding
    return before
