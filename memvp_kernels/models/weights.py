"""Where an FFN's matrices come from: plain tensors that the kernels read, or a module that only its owner understands.

Resolved at every call and never kept: sharding frees and refills the storage behind a weight, PEFT merges and swaps
linears, and a copy kept here would be stale after either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as _module

__all__ = ["Dense", "Matrices", "Opaque", "activation_name", "matrices", "resolve"]

# By class name: transformers has moved and renamed these classes, and several compute the same function.
_ACTIVATIONS = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}


class Dense(NamedTuple):
    """A linear layer that is nothing but its tensors: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None


class Opaque(NamedTuple):
    """A module to be called as it is, and why."""

    reason: str


class Matrices(NamedTuple):
    """An FFN's matrices as :func:`memvp_kernels.fused_ffn` takes them: key, gate (F, d); value (F, d), a view."""

    key: Tensor
    value: Tensor
    gate: Tensor | None
    key_bias: Tensor | None
    gate_bias: Tensor | None
    value_bias: Tensor | None


def resolve(linear: Any) -> Dense | Opaque:
    """What stands behind ``linear`` at this moment.

    Only a plain ``nn.Linear`` whose call would do nothing but ``x Wᵀ + b`` is dense. LoRA layers, quantised layers,
    parametrisations, hooks and replaced forwards are opaque: reading their weight would drop what they add.
    """
    kind = type(linear)
    if kind is not nn.Linear:
        return Opaque(f"is a {kind.__module__}.{kind.__qualname__}")
    if "forward" in linear.__dict__:
        return Opaque("has a forward of its own on the instance")
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks) or _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return Opaque("has hooks")
    for tensor in (linear.weight, linear.bias):
        if tensor is not None and type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return Opaque(f"holds {type(tensor).__name__} weights")
        if tensor is not None and not tensor.is_floating_point():
            return Opaque(f"holds {tensor.dtype} weights")
    return Dense(linear.weight, linear.bias)


def matrices(owner: nn.Module, *, key: str, value: str, gate: str | None = None) -> Matrices | Opaque:
    """The matrices of an FFN, or why it must run as it is.

    Args:
        owner: the module whose forward the kernels stand in for; that forward must be the one transformers wrote.
        key: name of the linear before the activation (gated: the one that is multiplied).
        value: name of the linear after it.
        gate: name of the linear under the activation of a gated FFN.
    """
    written_by = _forward_module(type(owner))
    if not written_by.startswith("transformers.models."):
        return Opaque(f"its forward comes from {written_by}")
    parts: dict[str, Dense] = {}
    for name in (key, value, gate):
        if name is None:
            continue
        part = resolve(owner._modules[name])
        if isinstance(part, Opaque):
            return Opaque(f"{name} {part.reason}")
        if parts and part.weight.dtype != parts[key].weight.dtype:
            return Opaque(f"{name} is {part.weight.dtype} beside {parts[key].weight.dtype}")
        parts[name] = part
    gate_weight, gate_bias = (None, None) if gate is None else parts[gate]
    return Matrices(
        key=parts[key].weight,
        value=parts[value].weight.T,
        gate=gate_weight,
        key_bias=parts[key].bias,
        gate_bias=gate_bias,
        value_bias=parts[value].bias,
    )


def activation_name(function: object) -> str | None:
    """The operator's name of an activation module; None for one that it does not compute."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function).__name__)


def _forward_module(kind: type) -> str:
    """Where the forward below this package's mixins was written (a library may have replaced the class's)."""
    for base in kind.__mro__:
        written_by = str(getattr(base.__dict__.get("forward"), "__module__", "memvp_kernels."))
        if not written_by.startswith("memvp_kernels."):
            return written_by
    return "nowhere"
