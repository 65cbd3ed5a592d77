"""The four large steps with their shared products by cuBLAS (torch.mm), and only what is not a plain product around them.

Each function replaces the fused kernel named in its docstring, argument for argument. A memory that all rows share (the d-wide operands
of a factored one) is one more dense product; a memory per sequence keeps the fused kernels' own tiles, launched alone.
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
    """As `hidden_forward`: one product for each pre-activation, then one pass to hidden.

    A bias is the product's own epilogue and rounded to x's dtype first, as in PyTorch's linear layer.
    """
    rows = x.shape[0]
    pre = stored = None
    if key is not None:
        pre = x.new_empty(1 + (gate is not None), rows, key.shape[0])
        branches = [(key, key_bias)] if gate is None else [(gate, gate_bias), (key, key_bias)]
        for out, (weight, bias) in zip(pre, branches, strict=True):
            _product(x, weight.T, bias, out)
        if need_hidden:
            stored = activation_forward(pre, activation, into=None if save_hidden else pre[0])
    of_memory = Products(None, None, None, None)
    if memory is not None and visual is None and segments.shared:
        of_memory = Products(None, None, None, _columns(x, memory))
    elif memory is not None:
        of_memory = memory_forward(x, activation, memory, segments, visual, save_scores=save_scores)
    return Products(stored, pre if save_hidden else None, of_memory.visual, of_memory.scores)


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
    """As `output_forward`: one product, and the memory accumulated onto it in place."""
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
    """As `dhidden_backward`: one product, then one pass to the gradients of the pre-activations.

    dHidden itself is stored where one of those gradients will be.
    """
    dpre = None
    if pre is not None and value is not None:
        dpre = pre if overwrite else torch.empty_like(pre)
        activation_backward(_product(grad, value.T, out=None if overwrite else dpre[-1]), pre, dpre, activation)
    of_memory = HiddenGradients(None, None, None, None)
    if memory is not None and scores is None:
        of_memory = HiddenGradients(None, None, None, _columns(grad, memory))
    elif scores is not None:
        of_memory = memory_backward(
            grad, activation, memory, memories, scores, segments, visual, need_visual=need_visual
        )
    return HiddenGradients(dpre, of_memory.dscores, of_memory.visual, of_memory.columns)


def dinput(
    dpre: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    dscores: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    like: Tensor,
) -> Tensor:
    """As `dinput_backward`: two products and the memory's, each accumulated in place."""
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
    """Add left · memory to y in place, each row of left times the memory that its sequence reads."""
    if left is None or memory is None:
        return y
    if segments.shared:
        return y.addmm_(left, memory[0])
    return accumulate_memory(y, left, memory, segments)
