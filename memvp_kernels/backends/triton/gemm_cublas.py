"""The four large steps with the shared products by the vendor's library (torch.mm), and around them only what is not a plain product.

Each function takes the place of the fused kernel named beside it, argument for argument, and may be mixed with the others':

    hidden     hidden_forward     one product for each pre-activation, then one pass to hidden
    output     output_forward     one product, the memory accumulated onto it in place
    dhidden    dhidden_backward   one product, then one pass to the gradients of the pre-activations
    dinput     dinput_backward    two products and the memory's, each accumulated in place

What this road moves beyond the fused kernels is the pass over what the product left in device memory, and y once more where memory is
added to it. A memory that all rows share (the d-wide operands of a factored one) is one more dense product; a memory per sequence stays
with the fused kernels' own tiles, launched alone: batched products would need a pass for activation and dropout as well.

The products sum as PyTorch's do: float32, or what `torch.backends.cuda.matmul` allows them instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.kernels.activation import activation_backward, activation_forward
from memvp_kernels.backends.triton.kernels.dhidden import HiddenGradients, memory_backward
from memvp_kernels.backends.triton.kernels.hidden import Products, memory_forward
from memvp_kernels.backends.triton.kernels.output import accumulate_memory, output_forward
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Segments

__all__ = ["dhidden", "dinput", "hidden", "output"]


def hidden(
    x: Tensor,
    key: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    memory: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    save_hidden: bool,
    save_scores: bool,
    need_hidden: bool = True,
) -> Products:
    """As `hidden_forward`. A bias is the product's own epilogue and rounded to x's dtype first, as PyTorch's linear layer has it."""
    rows = x.shape[0]
    pre = formed = None
    if key is not None:
        pre = x.new_empty(1 + (gate is not None), rows, key.shape[0])
        branches = [(key, key_bias)] if gate is None else [(gate, gate_bias), (key, key_bias)]
        for out, (weight, bias) in zip(pre, branches, strict=True):
            _product(x, weight.T, bias, out)
        if need_hidden:
            formed = activation_forward(pre, activation, into=None if save_hidden else pre[0])
    made = Products(None, None, None, None)
    if memory is not None and visual is None and segments.shared:
        made = Products(None, None, None, _columns(x, memory))
    elif memory is not None:
        made = memory_forward(x, activation, memory, segments, visual, save_scores=save_scores)
    return Products(formed, pre if save_hidden else None, made.visual, made.scores)


def output(
    hidden: Tensor | None,
    value: Tensor | None,
    value_bias: Tensor | None,
    visual: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    residual: Tensor | None,
    like: Tensor,
) -> Tensor:
    """As `output_forward`."""
    if hidden is None or value is None:
        if segments.shared and visual is not None and memory is not None:
            return _product(visual, memory[0], residual)
        return output_forward(None, None, value_bias, visual, memory, segments, residual, like)
    start = residual
    if value_bias is not None:
        start = value_bias if residual is None else residual + value_bias.to(residual.dtype)
    return _add_memory(_product(hidden, value, start), visual, memory, segments)


def dhidden(
    grad: Tensor,
    value: Tensor | None,
    pre: Tensor | None,
    activation: str,
    memory: Tensor | None,
    memories: int,
    scores: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    need_visual: bool,
    overwrite: bool,
) -> HiddenGradients:
    """As `dhidden_backward`. dHidden itself waits in the place of one of the gradients that it becomes."""
    dpre = None
    if pre is not None and value is not None:
        dpre = pre if overwrite else torch.empty_like(pre)
        activation_backward(_product(grad, value.T, out=None if overwrite else dpre[-1]), pre, dpre, activation)
    made = HiddenGradients(None, None, None, None)
    if memory is not None and scores is None:
        made = HiddenGradients(None, None, None, _columns(grad, memory))
    elif scores is not None:
        made = memory_backward(grad, activation, memory, memories, scores, segments, visual, need_visual=need_visual)
    return HiddenGradients(dpre, made.dscores, made.visual, made.columns)


def dinput(
    dpre: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    dscores: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    like: Tensor,
) -> Tensor:
    """As `dinput_backward`."""
    if dpre is None or key is None:
        return output(None, None, None, dscores, memory, segments, None, like)
    dx = _product(dpre[-1], key)
    if gate is not None:
        dx.addmm_(dpre[0], gate)
    return _add_memory(dx, dscores, memory, segments)


def _product(left: Tensor, right: Tensor, start: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """start + left · right; start is a bias of any float dtype, or a matrix."""
    if start is None:
        return torch.mm(left, right, out=out)
    return torch.addmm(start.to(left.dtype), left, right, out=out)


def _columns(left: Tensor, memory: Tensor) -> Tensor:
    """left memoryᵀ (N, M), rows at multiples of 16 elements, for a memory (1, M, d) that all rows share."""
    columns = launch.empty_rows(left.shape[0], memory.shape[1], left)
    return _product(left, memory[0].T, out=columns)


def _add_memory(y: Tensor, left: Tensor | None, memory: Tensor | None, segments: Segments) -> Tensor:
    """y + left · memory in y's place, each row of left times the memory that its sequence reads."""
    if left is None or memory is None:
        return y
    if segments.shared:
        return y.addmm_(left, memory[0])
    return accumulate_memory(y, left, memory, segments)
