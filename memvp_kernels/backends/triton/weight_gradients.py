"""Gradients of the FFN's own weights and biases, where they are trained: PyTorch's products over what the kernels saved."""

from __future__ import annotations

import torch
from torch import Tensor

from memvp_kernels.backends.triton.kernels.activation import activation_forward
from memvp_kernels.problem import Problem

__all__ = ["weight_gradients"]


def weight_gradients(
    problem: Problem, grad: Tensor, pre: Tensor | None, dpre: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """Gradients of key, gate, value and the three biases, those in `needs` only.

    Args:
        pre: (P, N, F) pre-activations; needed for value.
        dpre: (P, N, F) their gradients; needed for the others but value_bias.
    """
    grads: dict[str, Tensor] = {}
    if "value_bias" in needs:
        grads["value_bias"] = grad.sum(0, dtype=torch.float32)
    if "value" in needs:
        assert pre is not None
        grads["value"] = activation_forward(pre, problem.activation).T @ grad
    for name, branch in (("gate", 0), ("key", -1)):
        if name in needs:
            assert dpre is not None
            grads[name] = dpre[branch].T @ problem.x
        if f"{name}_bias" in needs:
            assert dpre is not None
            grads[f"{name}_bias"] = dpre[branch].sum(0, dtype=torch.float32)
    return grads
