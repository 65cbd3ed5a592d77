"""A base whose decoder layers are in 4 bits (bitsandbytes, NF4)."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from timing import tensor_bytes
from torch import nn


def missing() -> str | None:
    """Why this machine can't have it, or None."""
    return "bitsandbytes is not installed" if importlib.util.find_spec("bitsandbytes") is None else None


def quantize(model: Any) -> None:
    """Puts every linear layer of the decoder layers into NF4, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            own = linear.weight
            sizes = (linear.in_features, linear.out_features)
            small = Linear4bit(*sizes, bias=False, compute_dtype=own.dtype, quant_type="nf4", device="meta")
            small.weight = Params4bit(own.detach(), requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, small.to(own.device))


def dequantized(model: Any, like: Any) -> Any:
    """A copy of `like` with the matrices that the model's 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    found = copy.deepcopy(like)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if getattr(parameter, "quant_state", None) is not None:
                matrix = dequantize_4bit(parameter.data, parameter.quant_state)
                found.model.layers.get_parameter(name).copy_(matrix)
    return found


def base_bytes(model: nn.Module) -> int:
    """Bytes of the weights, and of what dequantizes them."""
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    return tensor_bytes(*(p.data for p in model.parameters()), *(s.absmax for s in states if s is not None))
