"""The activation between two products of cuBLAS: one pass over the pre-activations, forward and backward, in float32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate, activate_derivative
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.runtime.pdl import pdl_options

__all__ = ["activation_backward", "activation_bwd_kernel", "activation_forward", "activation_fwd_kernel"]

_BLOCK = 1024  # elements of a program: in 16 bits one 16-byte access per thread and operand


def activation_forward(pre: Tensor, activation: str, into: Tensor | None = None) -> Tensor:
    """hidden (N, F) from the pre-activations (P, N, F), contiguous.

    Args:
        into: (N, F) contiguous, possibly `pre[0]` where nobody else keeps it; default: a new tensor.
    """
    hidden = torch.empty_like(pre[0]) if into is None else into
    size = hidden.numel()
    with launch.on_device(pre):
        activation_fwd_kernel[(launch.programs(size, _BLOCK),)](
            pre, hidden, size, GATED=pre.shape[0] == 2, ACTIVATION=activation, DTYPE=launch.element_type(pre.dtype), BLOCK=_BLOCK,
            **pdl_options(pre.device),
        )  # fmt: skip
    return hidden


def activation_backward(dhidden: Tensor, pre: Tensor, dpre: Tensor, activation: str) -> None:
    """dpre (P, N, F), the gradients of the pre-activations, from dHidden (N, F); all contiguous.

    An element is read before it is written and by the same thread, so dpre may be pre, and dhidden any part of dpre.
    """
    size = dhidden.numel()
    with launch.on_device(pre):
        activation_bwd_kernel[(launch.programs(size, _BLOCK),)](
            dhidden, pre, dpre, size, GATED=pre.shape[0] == 2, ACTIVATION=activation, DTYPE=launch.element_type(pre.dtype), BLOCK=_BLOCK,
            **pdl_options(pre.device),
        )  # fmt: skip


@triton.jit
def activation_fwd_kernel(
    pre, hidden, size, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(size, BLOCK),) over the N · F elements."""
    pdl_wait(PDL)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    b_hidden = activate(tl.load(pre + offset, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        b_hidden *= tl.load(pre + size + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + offset, b_hidden.to(DTYPE), mask=inside)


@triton.jit
def activation_bwd_kernel(
    dhidden, pre, dpre, size, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(size, BLOCK),) over the N · F elements."""
    pdl_wait(PDL)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    b_dhidden = tl.load(dhidden + offset, mask=inside, other=0.0).to(tl.float32)
    b_active, b_slope = activate_derivative(tl.load(pre + offset, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        b_key = tl.load(pre + size + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(dpre + offset, (b_dhidden * b_key * b_slope).to(DTYPE), mask=inside)
        tl.store(dpre + size + offset, (b_dhidden * b_active).to(DTYPE), mask=inside)
    else:
        tl.store(dpre + offset, (b_dhidden * b_slope).to(DTYPE), mask=inside)
