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

from memvp_kernels import ops
from memvp_kernels.choose import choose

__all__ = ["Quantised", "Unreadable", "fused_ffn_restored", "read_quantised"]

#: torchao's weight-only tensors, and the attribute that says whether one of them rounds activations too.
_TORCHAO = {
    "Int8Tensor": "act_quant_kwargs",
    "Float8Tensor": "act_quant_kwargs",
    "IntxUnpackedToInt8Tensor": "activation_quantization",
}
_DIFFERENTIABLE = ("x", "visual_core", "visual_basis", "key_position", "value_position")


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


def fused_ffn_restored(
    restore: Callable[[torch.dtype], dict[str, Tensor | None]],
    x: Tensor,
    visual_core: Tensor,
    *,
    visual_basis: Tensor,
    key_position: Tensor,
    value_position: Tensor,
    visual_index: Tensor | None,
    seed: Tensor | None,
    scalars: dict[str, Any],
    recompute: bool,
    backend: str,
) -> Tensor:
    """:func:`memvp_kernels.fused_ffn` over frozen matrices that exist only while the forward, and again the backward, runs.

    Args:
        restore: x's dtype → key, value, gate and the biases, as the operator names them.
        x, visual_core, visual_basis, key_position, value_position, visual_index, recompute, backend: the operator's.
        seed: dropout's, (1,) int64; None without dropout.
        scalars: activation, visual_activation, visual_scale, dropout_p.

    Returns:
        Like x.
    """
    differentiable = (x, visual_core, visual_basis, key_position, value_position)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)):
        return ops.run_forward(
            _operator_tensors(restore, visual_index, seed, differentiable), scalars, 0, False, backend
        )[0]
    y: Tensor = _Restored.apply(  # type: ignore[no-untyped-call]
        restore, scalars, recompute, backend, visual_index, seed, *differentiable
    )
    return y


class _Restored(torch.autograd.Function):
    """Keeps what the operator keeps, but for the matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        restore: Callable[[torch.dtype], dict[str, Tensor | None]],
        scalars: dict[str, Any],
        recompute: bool,
        backend: str,
        visual_index: Tensor | None,
        seed: Tensor | None,
        *differentiable: Tensor,
    ) -> Tensor:
        keep = 0 if recompute else ops.KEEP_HIDDEN | ops.KEEP_SCORES
        tensors = _operator_tensors(restore, visual_index, seed, differentiable)
        y, pre, scores = ops.run_forward(tensors, scalars, keep, True, backend)
        ctx.save_for_backward(visual_index, seed, pre, scores, *differentiable)
        ctx.restore, ctx.scalars, ctx.backend = restore, scalars, backend
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        visual_index, seed, pre, scores, *differentiable = ctx.saved_tensors
        problem = ops.normalise(_operator_tensors(ctx.restore, visual_index, seed, differentiable), ctx.scalars)
        wants = dict(zip(_DIFFERENTIABLE, ctx.needs_input_grad[6:], strict=True))
        names = {name for name, want in wants.items() if want and name != "visual_core"}
        if wants["visual_core"]:
            names |= {"visual_key", "visual_value"}
        known = frozenset(name for name in names if getattr(problem, name) is not None)
        found: dict[str, Tensor] = {}
        if problem.rows and known:
            module = choose(problem, ctx.backend, training=True)
            found = module.backward(problem, grad.reshape(problem.x.shape), pre, scores, known)
        if "visual_key" in found:  # one core is both
            found["visual_core"] = found["visual_key"] + found["visual_value"]
        out: list[Tensor | None] = []
        for name, argument in zip(_DIFFERENTIABLE, differentiable, strict=True):
            gradient = found.get(name, torch.zeros_like(argument)) if wants[name] else None
            out.append(None if gradient is None else gradient.reshape(argument.shape))
        return (None, None, None, None, None, None, *out)


def _operator_tensors(
    restore: Callable[[torch.dtype], dict[str, Tensor | None]],
    visual_index: Tensor | None,
    seed: Tensor | None,
    differentiable: Any,
) -> dict[str, Tensor | None]:
    x, core, basis, key_position, value_position = differentiable
    return {
        **dict.fromkeys(("gate", "key_bias", "gate_bias", "value_bias", "residual", "visual_lengths", "cu_seqlens")),
        **restore(x.dtype),
        "x": x,
        "visual_key": core,
        "visual_value": core,
        "visual_basis": basis,
        "key_position": key_position,
        "value_position": value_position,
        "visual_index": visual_index,
        "seed": seed,
    }
