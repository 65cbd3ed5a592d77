"""An FFN together with the memory that is bound: fused, dequantized, tensor-parallel, or added to what the FFN computes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.parallel.tensor_parallel import all_reduce, part_of, rank_local_rng, sum_gradients
from memvp_kernels.models.patching.binding import Binding
from memvp_kernels.models.patching.mixins import MemoryFFN
from memvp_kernels.models.patching.weights import Matrices, Opaque, QuantizedMatrices, activation_name
from memvp_kernels.shared_memory import Dequantize, SharedMemory, fused_ffn_shared

__all__ = ["feed_forward", "log_opaque"]

_logger = logging.getLogger("memvp_kernels")

_QUANTIZED = "their matrices are quantized, and their own kernels read them as they are for a few tokens"
_FEW_TOKENS = (
    64  # up to here a quantized FFN's own kernels run; above, its matrices are dequantized once for all tokens
)


def feed_forward(
    ffn: MemoryFFN,
    x: Tensor,
    binding: Binding,
    *,
    weights: Matrices | QuantizedMatrices | Opaque,
    own: Callable[[], Tensor],
) -> Tensor:
    """The FFN together with the memory.

    Args:
        ffn: the FFN.
        x: (S, T, d), its input.
        binding: what its layer has bound.
        weights: its matrices; opaque: ``own`` computes the FFN, and the memory is added to that.
        own: the FFN as it is.

    Returns:
        (S, T, d).

    Raises:
        RuntimeError: training through an FFN that gives its input no gradient.
    """
    binding.used = True
    if binding.memory.readers is not None:
        binding.memory.readers.add(binding.layer)
    if isinstance(weights, Matrices):
        y = (_fused if weights.mesh is None else _tensor_parallel)(ffn, x, binding, weights)
    elif isinstance(weights, QuantizedMatrices) and _should_dequantize(x, weights):
        y = _dequantized(ffn, x, binding, weights)
    else:
        if not torch.compiler.is_compiling():
            log_opaque(weights.reason if isinstance(weights, Opaque) else _QUANTIZED)
        differentiable = isinstance(weights, QuantizedMatrices) or weights.differentiable
        y = _added(ffn, x, binding, own(), differentiable=differentiable)
    if binding.memory.observer is not None:
        binding.memory.observer(binding.layer, x, y)
    return y


def _with_memory(
    ffn: MemoryFFN,
    x: Tensor,
    binding: Binding,
    weights: Mapping[str, Tensor | None],
    *,
    memory: Memory | None = None,
    residual: Tensor | None = None,
    dequantize: Dequantize | None = None,
) -> Tensor:
    memory = binding.memory if memory is None else memory
    shared = memory.shared
    if shared is None:  # given by hand, or moved to another device on its way here
        parts = (memory.core, memory.basis, *memory.positions(binding.layer))
        shared = SharedMemory(*parts, x.dtype, visual_map=memory.visual_map)
    activation = activation_name(ffn.ffn_activation())
    assert activation is not None
    return fused_ffn_shared(
        x,
        weights,
        shared,
        binding.layer,
        visual_index=binding.index,
        residual=residual,
        activation=activation,
        visual_activation=memory.visual_activation,
        visual_drop=memory.visual_drop,
        visual_scale=memory.scale_of(binding.layer),
        dropout_p=memory.dropout,
        recompute=memory.recompute,
        backend=memory.backend,
        dequantize=dequantize,
    )


def _tensors(weights: Matrices) -> dict[str, Tensor | None]:
    return {name: getattr(weights, name) for name in ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")}


def _fused(ffn: MemoryFFN, x: Tensor, binding: Binding, weights: Matrices) -> Tensor:
    return _with_memory(ffn, x, binding, _tensors(weights))


def _tensor_parallel(ffn: MemoryFFN, x: Tensor, binding: Binding, weights: Matrices) -> Tensor:
    """This rank's pairs and slots, and the sum over the ranks."""
    mesh, memory = weights.mesh, binding.memory
    shard = part_of(memory, mesh) if memory.shard is None else memory.shard
    tensors = _tensors(weights._replace(value_bias=None))
    # under a visual_drop the ranks' shares are equal, and so is what they draw
    with rank_local_rng(mesh, x.device, 0.0 if memory.visual_drop > 0 else memory.dropout):
        y = _with_memory(ffn, sum_gradients(x, mesh), binding, tensors, memory=shard)
    y = all_reduce(y, mesh)
    return y if weights.value_bias is None else y + weights.value_bias.to(y.dtype)


def _dequantized(ffn: MemoryFFN, x: Tensor, binding: Binding, weights: QuantizedMatrices) -> Tensor:
    return _with_memory(ffn, x, binding, {}, dequantize=weights.dequantize)


def _should_dequantize(x: Tensor, weights: QuantizedMatrices) -> bool:
    """Not for a handful of tokens: reading half a byte per weight is what a quantized base is for in decode."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    few = x.numel() // x.shape[-1] <= _FEW_TOKENS
    return not few and weights.dtype in (None, x.dtype)


def _added(ffn: MemoryFFN, x: Tensor, binding: Binding, out: Tensor, *, differentiable: bool) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and not (differentiable and out.requires_grad):
        raise RuntimeError(
            "this feed-forward layer gives its input no gradient (its quantization rounds activations, or bitsandbytes has "
            "repacked it for inference on this CPU), so memory in the layers below would train on a wrong one; use a "
            "weight-only quantization, call train() before a bitsandbytes base runs for the first time, or run under "
            "torch.no_grad()"
        )
    if out.dtype == x.dtype:
        return _with_memory(ffn, x, binding, {}, residual=out)
    # autocast, or T5's float32 wo under float16: the layer goes on in the dtype of the FFN's own output
    return out + _with_memory(ffn, x, binding, {}).to(out.dtype)


@functools.cache
def log_opaque(reason: str) -> None:
    """Log, once per reason, that an FFN runs unfused."""
    _logger.warning("feed-forward layers run as they are and the memory is added to their output: %s", reason)
