"""The paper's training recipe: which parameters decay, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = ["BETAS", "learning_rate", "optimiser", "peak_learning_rate"]

BETAS = (0.9, 0.95)
_BASE_RATE, _BASE_BATCH = 9e-3, 256


def peak_learning_rate(batch: int) -> float:
    """9e-3 · batch / 256; the paper's batch is 32 over all devices and accumulated steps."""
    return _BASE_RATE * batch / _BASE_BATCH


def learning_rate(epoch: float, *, peak: float, epochs: float, warmup: float) -> float:
    """The rate at a fractional epoch: linear from 0 over the warm-up, then half a cosine to 0."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def optimiser(model: nn.Module, *, weight_decay: float = 0.02) -> torch.optim.AdamW:
    """AdamW over what is trainable; one-dimensional parameters (biases) do not decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS)
