"""Frozen matrices in 4 or 8 bits, dequantized for one call and kept by nobody.

A layer is recognised by its type alone, because ``hasattr(weight, "dequantize")`` is true of every tensor. Only layers
whose product is that of the dequantized matrix qualify; one that rounds the activations as well stays opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["QuantizedLinear", "Unreadable", "read_quantized"]

#: torchao's weight-only tensors, and the attribute that says whether one of them rounds activations too.
_TORCHAO = {
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
}


class QuantizedLinear(NamedTuple):
    """A linear layer with a matrix in fewer bits.

    Attributes:
        dequantize: dtype → (out, in), a new tensor. Reads the layer at that moment, since sharding swaps what it holds.
        bias: (out,) or None.
        dtype: in which the layer computes; None: in its input's.
    """

    dequantize: Callable[[torch.dtype], Tensor]
    bias: Tensor | None
    dtype: torch.dtype | None


class Unreadable(NamedTuple):
    """A quantized layer whose product is not that of a dequantized matrix.

    Attributes:
        reason: why.
        differentiable: False: its result silently loses its input's gradient.
    """

    reason: str
    differentiable: bool = True


def read_quantized(linear: Any) -> QuantizedLinear | Unreadable | None:
    """How to dequantize ``linear``'s matrix, or why not; None where it is not quantized."""
    kind = type(linear)
    if kind.__module__.startswith("bitsandbytes."):
        found = _bitsandbytes(linear)
    elif kind is nn.Linear and type(linear.weight).__module__.split(".")[0] == "torchao":
        found = _torchao(linear)
    else:
        return None
    if isinstance(found, QuantizedLinear) and found.bias is not None and found.bias.requires_grad:
        return Unreadable("has a trainable bias on a quantized weight")
    return found


def _bitsandbytes(linear: Any) -> QuantizedLinear | Unreadable:
    name = type(linear).__name__
    if name not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return Unreadable(f"is a bitsandbytes {name}, whose product rounds the activations too")
    state = _state_4bit(linear)
    if state is None:
        return Unreadable("is a bitsandbytes layer that is not quantized yet (move it to its device first)")
    if getattr(state, "packing_format_for_cpu", False):
        return Unreadable("was repacked by bitsandbytes for inference on this CPU", differentiable=False)

    def dequantize(dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # .data: a Params4bit's own __torch_function__ is of no use here, and FSDP's plain parameter has the same bytes
        return dequantize_4bit(linear.weight.data, _state_4bit(linear)).to(dtype)

    return QuantizedLinear(dequantize, linear.bias, linear.compute_dtype)


def _state_4bit(linear: Any) -> Any:
    """Kept on the module, too, because FSDP gathers the weight into a plain parameter that lacks it."""
    return linear.quant_state if linear.quant_state is not None else getattr(linear.weight, "quant_state", None)


def _torchao(linear: Any) -> QuantizedLinear | Unreadable:
    name = type(linear.weight).__name__
    if name not in _TORCHAO:
        return Unreadable(f"holds torchao {name} weights")
    if getattr(linear.weight, _TORCHAO[name], None) is not None:
        return Unreadable(f"holds torchao {name} weights whose product rounds the activations too")
    return QuantizedLinear(lambda dtype: linear.weight.dequantize().to(dtype), linear.bias, None)
