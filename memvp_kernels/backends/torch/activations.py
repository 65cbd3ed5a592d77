"""The activations in plain PyTorch, and their derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.checks import IDENTITY

__all__ = ["activate", "activate_", "activation_backward"]

_aten = torch.ops.aten


def activate(name: str, z: Tensor) -> Tensor:
    """A new tensor, but for the identity."""
    if name == IDENTITY:
        return z
    if name == "relu":
        return torch.relu(z)
    if name == "silu":
        return F.silu(z)
    return F.gelu(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activate_(name: str, z: Tensor) -> Tensor:
    """In place, for pre-activations that nobody keeps."""
    if name == IDENTITY:
        return z
    if name == "relu":
        return torch.relu_(z)
    if name == "silu":
        return F.silu(z, inplace=True)
    return _aten.gelu_(z, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_backward(name: str, grad: Tensor, z: Tensor) -> Tensor:
    if name == IDENTITY:
        return grad
    if name == "relu":
        return _aten.threshold_backward(grad, z, 0)
    if name == "silu":
        return _aten.silu_backward(grad, z)
    return _aten.gelu_backward(grad, z, approximate="tanh" if name == "gelu_tanh" else "none")
