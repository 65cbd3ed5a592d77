"""The torch backend: the two branches in plain PyTorch, for any dtype and device. The fallback, the CPU path and the baseline.

No weight is copied, and a frozen one costs nothing. The backward keeps the pre-activations alone, and none with ``recompute``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memvp_kernels.backends.torch.activations import activate, activate_, activation_backward
from memvp_kernels.backends.torch.inference import prepare
from memvp_kernels.backends.torch.products import product
from memvp_kernels.backends.torch.visual import VisualBranch, memory_backward
from memvp_kernels.problem import BEHIND_PRE, SHARED, Problem

__all__ = ["backward", "forward", "prepare", "unsupported"]

_NO_SUMS: Mapping[str, Tensor] = {}


def unsupported(problem: Problem) -> str | None:
    """Why this backend can't take the problem: it always can."""
    return None


def _pre_activations(p: Problem, kept: Tensor | None) -> list[Tensor]:
    """[gate's, key's] or [key's], each (N, F); written into `kept` (P, N, F) where it is given."""
    assert p.key is not None
    weights = [(p.key, p.key_bias)] if p.gate is None else [(p.gate, p.gate_bias), (p.key, p.key_bias)]
    return [
        product(p.x, weight.T, bias, out=None if kept is None else kept[i]) for i, (weight, bias) in enumerate(weights)
    ]


def forward(problem: Problem, *, save_hidden: bool, save_scores: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (N, d), and what the backward asked to keep: the pre-activations (P, N, F), the scores (N, M)."""
    p = problem
    pre = scores = None
    if p.key is not None and p.value is not None:
        if save_hidden:
            pre = p.x.new_empty(2 if p.gated else 1, p.rows, p.pairs)
        z = _pre_activations(p, pre)
        hidden = activate(p.activation, z[0]) if save_hidden else activate_(p.activation, z[0])
        if p.gated:
            hidden.mul_(z[1])
        start = p.residual
        if p.value_bias is not None:
            start = p.value_bias.to(p.x.dtype) if start is None else start + p.value_bias.to(p.x.dtype)
        y = product(hidden, p.value, start)
    else:
        y = p.x.new_zeros(p.x.shape) if p.residual is None else p.residual.clone(memory_format=torch.contiguous_format)
    if p.has_memory:
        memory = VisualBranch(p)
        scores = memory.scores()
        memory.add_output_(y, memory.visual(scores))
    return y, pre, scores if save_scores else None


def backward(
    problem: Problem,
    grad: Tensor,
    pre: Tensor | None,
    scores: Tensor | None,
    needs: frozenset[str],
    sums: Mapping[str, Tensor] = _NO_SUMS,
) -> dict[str, Tensor]:
    """The gradients named by `needs`, each with its argument's shape and dtype; those of `SHARED` float32 at least, added to `sums`."""
    grads = _ffn_backward(problem, grad, pre, needs) if problem.key is not None else {}
    if problem.has_memory:
        memory_backward(problem, grad, scores, needs, grads, sums)
    if "x" in needs and "x" not in grads:
        grads["x"] = torch.zeros_like(problem.x, memory_format=torch.contiguous_format)
    return {name: g if name in SHARED else g.to(getattr(problem, name).dtype) for name, g in grads.items()}


def _ffn_backward(p: Problem, grad: Tensor, pre: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
    assert p.key is not None and p.value is not None
    grads: dict[str, Tensor] = {}
    through = not needs.isdisjoint(BEHIND_PRE)
    if p.value_bias is not None and "value_bias" in needs:
        grads["value_bias"] = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    if not through and "value" not in needs:
        return grads
    z = _pre_activations(p, None) if pre is None else list(pre)
    activated = activate(p.activation, z[0]) if p.gated or "value" in needs else z[0]
    if "value" in needs:
        grads["value"] = (activated * z[1] if p.gated else activated).T @ grad
    if not through:
        return grads
    dhidden = grad @ p.value.T
    if p.gate is not None:
        dkey = dhidden * activated
        dgate = activation_backward(p.activation, dhidden.mul_(z[1]), z[0])
        branches = [("gate", p.gate, dgate), ("key", p.key, dkey)]
    else:
        branches = [("key", p.key, activation_backward(p.activation, dhidden, z[0]))]
    for name, weight, dpre in branches:
        if name in needs:
            grads[name] = dpre.T @ p.x
        if f"{name}_bias" in needs:
            grads[f"{name}_bias"] = dpre.sum(0, dtype=torch.promote_types(dpre.dtype, torch.float32))
        if "x" in needs:
            grads["x"] = dpre @ weight if "x" not in grads else grads["x"].addmm_(dpre, weight)
    return grads
