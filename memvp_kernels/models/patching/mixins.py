"""The mixins that carry memory through a language model to its FFNs, and the FFN with memory that runs there."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.parallel.tensor_parallel import own_draw, own_slots, sum_gradients, summed
from memvp_kernels.models.patching.patch import Reclassed
from memvp_kernels.models.patching.weights import Matrices, Opaque, Packed, activation_name
from memvp_kernels.shared_memory import Restore, SharedMemory, fused_ffn_shared

__all__ = ["MemoryFFN", "MemoryLanguageModel", "MemoryLayer", "feed_forward", "say_opaque"]

_logger = logging.getLogger("memvp_kernels")

_PACKED = "their matrices are packed in fewer bits, which their own kernels read as they are for a few tokens"
_FEW_TOKENS = 64  # up to here a quantised FFN's own kernels run; above, its matrices are restored once for all tokens


class MemoryLanguageModel(Reclassed):
    """In front of a language model: generate() lets two more arguments through to the layers.

    ``visual_memory`` is a tuple, which generate() hands on untouched; ``memory_index`` is a tensor, which it repeats
    for beams and returned sequences. So no memory row is ever copied. Where nothing is repeated there is no index, and
    every decoded token takes the batched product that needs none.
    """

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        ours = ("visual_memory", "memory_index")
        kept = {name: model_kwargs.pop(name) for name in ours if name in model_kwargs}
        try:
            super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        finally:
            model_kwargs.update(kept)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        memory: Memory | None = kwargs.get("visual_memory")
        if expand_size > 1 and memory is not None and kwargs.get("memory_index") is None:
            rows = memory.core.shape[0]
            kwargs["memory_index"] = torch.arange(rows, dtype=torch.int32, device=memory.core.device)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )


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

    def ffn_matrices(self) -> Matrices | Packed | Opaque:
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


def feed_forward(
    ffn: MemoryFFN, x: Tensor, *, weights: Matrices | Packed | Opaque, own: Callable[[], Tensor]
) -> Tensor:
    """The FFN together with the memory bound to it.

    Args:
        ffn: the bound FFN.
        x: (S, T, d), its input.
        weights: its matrices; opaque: ``own`` computes the FFN, and the memory is added to that.
        own: the FFN as it is.

    Returns:
        (S, T, d).

    Raises:
        RuntimeError: training through an FFN that gives its input no gradient.
    """
    memory, layer = ffn.memory, ffn.memory_layer
    assert memory is not None and layer is not None
    if isinstance(weights, Matrices):
        y = _fused(ffn, x, memory, weights) if weights.mesh is None else _spread(ffn, x, memory, weights)
    elif isinstance(weights, Packed) and _worth_restoring(x, weights):
        y = _restored(ffn, x, memory, weights)
    else:
        if isinstance(weights, (Opaque, Packed)) and not torch.compiler.is_compiling():
            say_opaque(weights.reason if isinstance(weights, Opaque) else _PACKED)
        y = _added(ffn, x, memory, own(), differentiable=isinstance(weights, Packed) or weights.differentiable)
    if memory.observer is not None:
        memory.observer(layer, x, y)
    return y


def _with_memory(
    ffn: MemoryFFN,
    x: Tensor,
    memory: Memory,
    weights: Mapping[str, Tensor | None],
    residual: Tensor | None = None,
    restore: Restore | None = None,
) -> Tensor:
    layer, shared = ffn.memory_layer, memory.shared
    assert layer is not None
    if shared is None:  # given by hand, or moved to another device on its way here
        shared = SharedMemory(memory.core, memory.basis, *memory.positions(layer), x.dtype)
    activation = activation_name(ffn.ffn_activation())
    assert activation is not None
    return fused_ffn_shared(
        x,
        weights,
        shared,
        layer,
        visual_index=ffn.memory_index,
        residual=residual,
        activation=activation,
        visual_scale=memory.scale,
        dropout_p=memory.dropout,
        recompute=memory.recompute,
        backend=memory.backend,
        restore=restore,
    )


def _fused(ffn: MemoryFFN, x: Tensor, memory: Memory, weights: Matrices) -> Tensor:
    names = ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")
    return _with_memory(ffn, x, memory, {name: getattr(weights, name) for name in names})


def _spread(ffn: MemoryFFN, x: Tensor, memory: Memory, weights: Matrices) -> Tensor:
    """This rank's pairs and slots, and the sum over the ranks."""
    mesh = weights.mesh
    part = own_slots(memory, mesh) if memory.own is None else memory.own
    with own_draw(mesh, x.device, memory.dropout):
        y = _fused(ffn, sum_gradients(x, mesh), part, weights._replace(value_bias=None))
    y = summed(y, mesh)
    return y if weights.value_bias is None else y + weights.value_bias.to(y.dtype)


def _restored(ffn: MemoryFFN, x: Tensor, memory: Memory, weights: Packed) -> Tensor:
    return _with_memory(ffn, x, memory, {}, restore=weights.restore)


def _worth_restoring(x: Tensor, weights: Packed) -> bool:
    """A handful of tokens leave the matrices packed: reading half a byte per weight is what a packed base is for in decode."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    few = x.numel() // x.shape[-1] <= _FEW_TOKENS
    return not few and weights.dtype in (None, x.dtype)


def _added(ffn: MemoryFFN, x: Tensor, memory: Memory, out: Tensor, *, differentiable: bool) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and not (differentiable and out.requires_grad):
        raise RuntimeError(
            "this feed-forward layer gives its input no gradient (its quantisation rounds activations, or bitsandbytes has "
            "repacked it for inference on this CPU), so memory in the layers below would train on a wrong one; use a "
            "weight-only quantisation, call train() before a bitsandbytes base runs for the first time, or run under "
            "torch.no_grad()"
        )
    if out.dtype == x.dtype:
        return _with_memory(ffn, x, memory, {}, residual=out)
    # autocast, or T5's float32 wo under float16: the layer goes on in the dtype of its own answer
    return out + _with_memory(ffn, x, memory, {}).to(out.dtype)


@functools.cache
def say_opaque(reason: str) -> None:
    """Say, once per reason, that an FFN runs unfused."""
    _logger.warning("feed-forward layers run as they are and the memory is added to their output: %s", reason)
