"""A frozen base in 4 or 8 bits: its matrices restored for one call, twice per step, and kept by nobody.

A layer that stores x's partner in fewer bits is read by its type alone: ``hasattr(weight, "dequantize")`` is true for every
tensor, and of some packed ones gives the packed bytes as numbers. Known are the layers whose product is that of the restored
matrix; one that rounds the activations as well (LLM.int8, dynamic quantisation) computes something else and stays opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Quantised", "Unreadable", "read_quantised"]

#: torchao's weight-only tensors, and the attribute that says whether one of them rounds activations too.
_TORCHAO = {
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
}


class Quantised(NamedTuple):
    """A linear layer that restores its matrix when asked.

    Attributes:
        restore: dtype → (out, in), made anew; reads the layer at that moment, since sharding swaps what it holds.
        bias: (out,) or None.
        dtype: in which the layer computes; None: in its input's.
    """

    restore: Callable[[torch.dtype], Tensor]
    bias: Tensor | None
    dtype: torch.dtype | None


class Unreadable(NamedTuple):
    """A quantised layer whose product is not that of a restored matrix.

    Attributes:
        reason: for whom it may concern.
        differentiable: False: its result loses its input's gradient, without a word.
    """

    reason: str
    differentiable: bool = True


def read_quantised(linear: Any) -> Quantised | Unreadable | None:
    """How to restore ``linear``'s matrix, or why not; None where it is not quantised."""
    kind = type(linear)
    if kind.__module__.startswith("bitsandbytes."):
        found = _bitsandbytes(linear)
    elif kind is nn.Linear and type(linear.weight).__module__.split(".")[0] == "torchao":
        found = _torchao(linear)
    else:
        return None
    if isinstance(found, Quantised) and found.bias is not None and found.bias.requires_grad:
        return Unreadable("has a trainable bias on a quantised weight")
    return found


def _bitsandbytes(linear: Any) -> Quantised | Unreadable:
    name = type(linear).__name__
    if name not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return Unreadable(f"is a bitsandbytes {name}, whose product rounds the activations too")
    state = _state_4bit(linear)
    if state is None:
        return Unreadable("is a bitsandbytes layer that is not quantised yet (move it to its device first)")
    if getattr(state, "packing_format_for_cpu", False):
        return Unreadable("was repacked by bitsandbytes for inference on this CPU", differentiable=False)

    def restore(dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        # .data: a Params4bit's own __torch_function__ is of no use here, and FSDP's plain parameter has the same bytes
        return dequantize_4bit(linear.weight.data, _state_4bit(linear)).to(dtype)

    return Quantised(restore, linear.bias, linear.compute_dtype)


def _state_4bit(linear: Any) -> Any:
    """Kept on the module, too, because FSDP gathers the weight into a plain parameter that lacks it."""
    return linear.quant_state if linear.quant_state is not None else getattr(linear.weight, "quant_state", None)


def _torchao(linear: Any) -> Quantised | Unreadable:
    name = type(linear.weight).__name__
    if name not in _TORCHAO:
        return Unreadable(f"holds torchao {name} weights")
    if getattr(linear.weight, _TORCHAO[name], None) is not None:
        return Unreadable(f"holds torchao {name} weights whose product rounds the activations too")
    return Quantised(lambda dtype: linear.weight.dequantize().to(dtype), linear.bias, None)
