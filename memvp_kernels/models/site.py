"""The mixins that carry memory through a language model to its FFNs, and the FFN with memory that runs there."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.ffn import fused_ffn
from memvp_kernels.models.memory import Memory
from memvp_kernels.models.reclass import Reclassed
from memvp_kernels.models.weights import Matrices, Opaque, activation_name

__all__ = ["MemoryFFN", "MemoryLanguageModel", "MemoryLayer", "feed_forward", "say_opaque"]

_logger = logging.getLogger("memvp_kernels")


class MemoryLanguageModel(Reclassed):
    """In front of a language model: generate() lets two more arguments through to the layers.

    ``visual_memory`` is a tuple, which generate() hands on untouched; ``memory_index`` is a tensor, which it repeats
    for beams and returned sequences. So no memory row is ever copied.
    """

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        ours = ("visual_memory", "memory_index")
        kept = {name: model_kwargs.pop(name) for name in ours if name in model_kwargs}
        try:
            super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        finally:
            model_kwargs.update(kept)


class MemoryFFN(Reclassed):
    """In front of an FFN: with a memory bound, it computes the FFN and its memory in one.

    Attributes:
        memory_layer: position among the layers that have memory; None: this one has none.
        memory: bound while the layer's forward runs.
        memory_index: (S,), the memory row of each sequence; None: sequence s reads row s.
    """

    memory_layer: int | None = None
    memory: Memory | None = None
    memory_index: Tensor | None = None

    def ffn_matrices(self) -> Matrices | Opaque:
        """The FFN's matrices at this moment."""
        raise NotImplementedError

    def ffn_activation(self) -> nn.Module:
        """The FFN's activation function."""
        raise NotImplementedError


class MemoryLayer(Reclassed):
    """In front of a layer: keeps the memory from the attention and binds it to the layer's FFN.

    Bound here and not further out, because this forward is what activation checkpointing runs a second time.
    """

    def memory_ffn(self) -> MemoryFFN:
        """The part of this layer that computes its FFN."""
        raise NotImplementedError

    def forward(
        self, *args: Any, visual_memory: Memory | None = None, memory_index: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The layer's own forward, its FFN with memory."""
        ffn = self.memory_ffn()
        if visual_memory is None or ffn.memory_layer is None:
            return super().forward(*args, **kwargs)
        ffn.memory, ffn.memory_index = visual_memory, memory_index
        try:
            return super().forward(*args, **kwargs)
        finally:
            ffn.memory, ffn.memory_index = None, None


def feed_forward(ffn: MemoryFFN, x: Tensor, *, weights: Matrices | Opaque, own: Callable[[], Tensor]) -> Tensor:
    """The FFN together with the memory bound to it.

    Args:
        ffn: the bound FFN.
        x: (S, T, d), its input.
        weights: its matrices; opaque: ``own`` computes the FFN, and the memory is added to that.
        own: the FFN as it is.

    Returns:
        (S, T, d).
    """
    memory, layer = ffn.memory, ffn.memory_layer
    assert memory is not None and layer is not None
    key_position, value_position = memory.positions(layer)
    common: dict[str, Any] = {
        "visual_basis": memory.basis,
        "key_position": key_position,
        "value_position": value_position,
        "activation": activation_name(ffn.ffn_activation()),
        "visual_scale": memory.scale,
        "dropout_p": memory.dropout,
        "visual_index": ffn.memory_index,
        "recompute": memory.recompute,
        "backend": memory.backend,
    }
    if isinstance(weights, Opaque):
        if not torch.compiler.is_compiling():
            say_opaque(weights.reason)
        out = own()
        # own() may answer in another dtype than x's (autocast, T5's float32 wo); the layer goes on in that one
        y = fused_ffn(x.to(out.dtype), None, None, memory.core, memory.core, residual=out, **common)
    else:
        y = fused_ffn(
            x,
            weights.key,
            weights.value,
            memory.core,
            memory.core,
            gate=weights.gate,
            key_bias=weights.key_bias,
            gate_bias=weights.gate_bias,
            value_bias=weights.value_bias,
            **common,
        )
    if memory.observer is not None:
        memory.observer(layer, x, y)
    return y


@functools.cache
def say_opaque(reason: str) -> None:
    """Say, once per reason, that an FFN runs unfused."""
    _logger.warning("feed-forward layers run as they are and the memory is added to their output: %s", reason)
