"""Gradients of the FFN's own weights and biases, for those who train them: PyTorch's products over what the kernels left behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton import launch
from memvp_kernels.backends.triton.activations import activate
from memvp_kernels.problem import Problem

__all__ = ["form_hidden", "form_hidden_kernel", "weight_gradients"]

_BLOCK = 1024


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
        grads["value"] = form_hidden(pre, problem.activation).T @ grad
    for name, branch in (("gate", 0), ("key", -1)):
        if name in needs:
            assert dpre is not None
            grads[name] = dpre[branch].T @ problem.x
        if f"{name}_bias" in needs:
            assert dpre is not None
            grads[f"{name}_bias"] = dpre[branch].sum(0, dtype=torch.float32)
    return grads


def form_hidden(pre: Tensor, activation: str) -> Tensor:
    """hidden (N, F) from the pre-activations (P, N, F), contiguous, in float32 and rounded once."""
    hidden = torch.empty_like(pre[0])
    with launch.on_device(pre):
        form_hidden_kernel[(triton.cdiv(hidden.numel(), _BLOCK),)](
            pre, hidden, hidden.numel(), GATED=pre.shape[0] == 2, ACTIVATION=activation, DTYPE=launch.element_type(pre.dtype), BLOCK=_BLOCK
        )  # fmt: skip
    return hidden


@triton.jit
def form_hidden_kernel(
    pre, hidden, size, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (cdiv(size, BLOCK),) over the N · F elements."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    b_hidden = activate(tl.load(pre + offset, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        b_hidden *= tl.load(pre + size + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + offset, b_hidden.to(DTYPE), mask=inside)
