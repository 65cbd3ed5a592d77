"""Where an FFN's matrices come from: tensors that the kernels read, or a module that has to be called.

Resolved at every call and never kept: sharding frees and refills the storage behind a weight, and PEFT merges and swaps
linears.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from memvp_kernels.models.parallel.quantized import QuantizedLinear, Unreadable, read_quantized
from memvp_kernels.models.parallel.tensor_parallel import Split, local_part, read_split
from memvp_kernels.models.patching.patch import replaced_forward

__all__ = ["Dense", "Matrices", "Opaque", "QuantizedMatrices", "activation_name", "matrices", "resolve"]

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
    """A linear layer that is nothing but its tensors: weight (out, in), bias (out,) or None.

    Under tensor parallelism, this rank's part of them, and ``split`` says which part that is.
    """

    weight: Tensor
    bias: Tensor | None
    split: Split | None = None


class Opaque(NamedTuple):
    """A module to be called as it is, and why.

    Attributes:
        reason: why.
        differentiable: False: it is known to lose its input's gradient.
    """

    reason: str
    differentiable: bool = True


class Matrices(NamedTuple):
    """An FFN's matrices as :func:`memvp_kernels.fused_ffn` takes them: key, gate (F, d); value (F, d), a view.

    Attributes:
        mesh: the ranks over which the F pairs are spread; then these are this rank's, and ``value_bias`` is to be added once,
            to the sum over the ranks. None: all of them.
    """

    key: Tensor
    value: Tensor
    gate: Tensor | None
    key_bias: Tensor | None
    gate_bias: Tensor | None
    value_bias: Tensor | None
    mesh: Any | None = None


class QuantizedMatrices(NamedTuple):
    """An FFN's matrices in fewer bits, each dequantized for one call.

    Attributes:
        key, value, gate: the three (or two) layers.
        dtype: in which they compute; None: in their input's.
    """

    key: QuantizedLinear
    value: QuantizedLinear
    gate: QuantizedLinear | None
    dtype: torch.dtype | None

    def dequantize(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The matrices and biases in ``dtype``, by the operator's names."""
        return {
            "key": self.key.dequantize(dtype),
            "value": self.value.dequantize(dtype).T,
            "gate": None if self.gate is None else self.gate.dequantize(dtype),
            "key_bias": _in(self.key.bias, dtype),
            "gate_bias": None if self.gate is None else _in(self.gate.bias, dtype),
            "value_bias": _in(self.value.bias, dtype),
        }


def resolve(linear: Any) -> Dense | QuantizedLinear | Opaque:
    """What stands behind ``linear`` at this moment.

    Dense is a plain ``nn.Linear`` whose call would do nothing but ``x Wᵀ + b``, or such a one under the tensor parallelism of
    transformers; quantized, one whose call would do that with a dequantized W. LoRA layers, parametrisations, hooks, replaced
    forwards and whatever else is not understood are opaque: reading their weight would drop what they add.
    """
    kind, own = type(linear), vars(linear)
    split = None
    if "forward" in own:
        split = read_split(linear) if kind is nn.Linear else None
        if split is None:
            return Opaque("has a forward of its own on the instance")
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooks or _module._has_any_global_hook():  # type: ignore[no-untyped-call]
        if type(linear.weight).__name__ == "DTensor":
            return Opaque("is spread over ranks by hooks (parallelize_module), which sum what the ranks compute")
        return Opaque("has hooks")
    if split is not None:
        return _part(linear, split)
    if kind is nn.Linear:
        parameters = own["_parameters"]  # quicker than the module's own attributes
        weight, bias = (parameters[n] if n in parameters else getattr(linear, n) for n in ("weight", "bias"))
        if _is_plain(weight) and (bias is None or _is_plain(bias)):
            return Dense(weight, bias)
    found = read_quantized(linear)
    if found is not None:
        return Opaque(*found) if isinstance(found, Unreadable) else found
    if kind is not nn.Linear:
        return Opaque(f"is a {kind.__module__}.{kind.__qualname__}")
    strange = linear.weight if not _is_plain(linear.weight) else linear.bias
    return Opaque(f"holds {strange.dtype} {type(strange).__name__} weights")


def _is_plain(t: Tensor | None) -> bool:
    return t is None or (type(t) in (nn.Parameter, Tensor) and t.is_floating_point())


def _part(linear: Any, split: Split) -> Dense | Opaque:
    columns = split.kind == "columns"
    weight = local_part(linear.weight, split, 0 if columns else 1)
    bias = None if linear.bias is None else local_part(linear.bias, split, 0 if columns else None)
    if weight is None or (linear.bias is not None and bias is None):
        return Opaque("is stored in another way than its tensor parallelism says")
    return Dense(weight, bias, split)


def matrices(
    owner: nn.Module, *, key: str, value: str, gate: str | None = None
) -> Matrices | QuantizedMatrices | Opaque:
    """The matrices of an FFN, or why it must run as it is.

    Args:
        owner: the module whose forward the kernels stand in for; that forward must be the one transformers wrote.
        key: name of the linear before the activation (gated: the one that is multiplied).
        value: name of the linear after it.
        gate: name of the linear under the activation of a gated FFN.
    """
    if replaced_forward(owner) is not None:
        return Opaque("a forward was set on the instance")
    written_by = _forward_module(type(owner))
    if not written_by.startswith("transformers.models."):
        return Opaque(f"its forward comes from {written_by}")
    parts: dict[str, Dense] = {}
    quantized: dict[str, QuantizedLinear] = {}
    for name in (key, value, gate):
        if name is None:
            continue
        part = resolve(owner._modules[name])
        if isinstance(part, Opaque):
            return Opaque(f"{name} {part.reason}", part.differentiable)
        if isinstance(part, QuantizedLinear):
            quantized[name] = part
            continue
        if parts and part.weight.dtype != parts[key].weight.dtype:
            return Opaque(f"{name} is {part.weight.dtype} beside {parts[key].weight.dtype}")
        parts[name] = part
    if quantized:
        return _quantized(quantized, parts, key, value, gate)
    ways = {name: part.split for name, part in parts.items()}
    mesh = None
    if any(ways.values()):
        if not all(
            way is not None and way.kind == ("rows" if name == value else "columns") for name, way in ways.items()
        ):
            return Opaque("its matrices are spread over ranks in ways that do not fit together")
        mesh = next(way.mesh for way in ways.values() if way is not None)
    gate_part = None if gate is None else parts[gate]
    return Matrices(
        key=parts[key].weight,
        value=parts[value].weight.T,
        gate=None if gate_part is None else gate_part.weight,
        key_bias=parts[key].bias,
        gate_bias=None if gate_part is None else gate_part.bias,
        value_bias=parts[value].bias,
        mesh=mesh,
    )


def _quantized(
    quantized: dict[str, QuantizedLinear], dense: dict[str, Dense], key: str, value: str, gate: str | None
) -> QuantizedMatrices | Opaque:
    dtypes = {part.dtype for part in quantized.values()}
    if dense or len(dtypes) > 1:
        return Opaque("some of its matrices are quantized, or differently from the others")
    return QuantizedMatrices(quantized[key], quantized[value], None if gate is None else quantized[gate], dtypes.pop())


def _in(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def activation_name(function: object) -> str | None:
    """The operator's name of an activation module; None for one that it does not compute."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function).__name__)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _forward_module(kind: type) -> str:
    """Where the forward below this package's mixins was written (a library may have replaced the class's)."""
    for base in kind.__mro__:
        own = base.__dict__.get("forward")
        if own is None:
            continue
        written_by = str(getattr(own, "__module__", "memvp_kernels."))
        if not written_by.startswith("memvp_kernels."):
            return written_by
    return "nowhere"
