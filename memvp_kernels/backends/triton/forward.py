"""The forward in Triton: hidden and output, and with a factored memory the core kernel between them.

Each step is one launch where it is fused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memvp_kernels import philox
from memvp_kernels.backends.torch import eager
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.gemm import GemmSteps, choose_steps
from memvp_kernels.backends.triton.kernels.core import core_forward
from memvp_kernels.backends.triton.kernels.hidden import Products
from memvp_kernels.backends.triton.kernels.materialise import (
    dense_segments,
    key_operand,
    materialise_memory,
    value_operand,
)
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.scores import has_own_scores, visual_of_own_scores
from memvp_kernels.problem import Problem

__all__ = ["forward", "is_trivial", "is_unread", "unsupported", "visual_of", "without_memory"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(problem: Problem) -> str | None:
    """Why this backend can't take this input here, or None."""
    device = problem.x.device
    if problem.x.dtype not in _DTYPES:
        return f"the triton backend computes in float32, float16 and bfloat16, not {str(problem.x.dtype).removeprefix('torch.')}"
    if launch.interpreted():
        return None
    if device.type != "cuda":
        return f"the triton backend needs tensors on an NVIDIA GPU, these are on {device}; or set TRITON_INTERPRET=1 before Python starts, for tests"
    if launch.architecture(device) < 80:
        return f"the triton backend needs sm_80 or newer, {torch.cuda.get_device_name(device)} is sm_{launch.architecture(device)}"
    return None


def visual_of(problem: Problem) -> Visual:
    """How a score becomes a visual activation, with dropout's 1/(1 - p) in the scale."""
    keep = 1.0 - problem.dropout_p
    scale = problem.visual_scale / keep if keep > 0 else 0.0
    threshold = philox.keep_threshold(problem.dropout_p)
    return Visual(problem.visual_activation, scale, problem.seed if problem.dropout_p > 0 else None, threshold)


def without_memory(problem: Problem) -> Problem:
    """The same problem without its visual branch, for a memory without slots, rows or readers."""
    return replace(
        problem,
        visual_key=None,
        visual_value=None,
        visual_basis=None,
        key_position=None,
        value_position=None,
        key_operand=None,
        value_operand=None,
        seed=None,
        dropout_p=0.0,
    )


def is_unread(problem: Problem) -> bool:
    """Whether there is a memory that no row can read."""
    return problem.has_memory and 0 in (problem.slots, problem.memories, problem.segments.sequences)


def is_trivial(problem: Problem) -> bool:
    """Whether there is nothing to launch, so that PyTorch's own handling of empty tensors serves."""
    empty = 0 in (problem.rows, problem.width) or (problem.key is not None and problem.pairs == 0)
    # A factored memory of rank 0 still has its positions.
    return empty or (problem.factored and problem.rank == 0) or (is_unread(problem) and problem.key is None)


def forward(
    problem: Problem, *, save_hidden: bool, save_scores: bool, steps: GemmSteps | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The forward pass.

    Args:
        save_hidden, save_scores: what the backward will need.
        steps: what computes the large products; None: the cost model's choice.

    Returns:
        y (N, d), the pre-activations (P, N, F) and the scores (N, M), the last two None unless asked for.
    """
    x, segments = problem.x, problem.segments
    unread = is_unread(problem)
    if is_trivial(problem) or (problem.key is None and not problem.has_memory):
        return eager.forward(problem, save_hidden=save_hidden, save_scores=save_scores)
    if unread:
        y, pre, _ = forward(without_memory(problem), save_hidden=save_hidden, save_scores=False, steps=steps)
        return y, pre, x.new_zeros(problem.rows, problem.slots) if save_scores else None

    steps = choose_steps(problem) if steps is None else steps
    visual = visual_of(problem)
    descriptors = launch.has_tma(x.device)
    save_scores = save_scores and problem.has_memory
    key_memory = value_memory = None
    own_scores = has_own_scores(problem)
    if problem.factored:
        value_memory = value_operand(problem)[None]
        key_memory = None if own_scores else key_operand(problem)[None]
    elif problem.has_memory:
        assert problem.visual_key is not None and problem.visual_value is not None
        if not own_scores:
            key_memory = materialise_memory(
                problem.visual_key, problem.key_position, None, x.dtype, descriptors=descriptors
            )
        value_memory = materialise_memory(
            problem.visual_value, problem.value_position, segments.lengths, x.dtype, descriptors=descriptors
        )

    dense = dense_segments(problem.rows)
    products = Products(None, None, None, None)
    if problem.key is not None or key_memory is not None:
        products = steps.hidden(
            x, problem.key, problem.gate, problem.key_bias, problem.gate_bias, problem.activation,
            key_memory, dense if problem.factored else segments, None if problem.factored else visual,
            save_hidden=save_hidden, save_scores=save_scores or problem.factored,
        )  # fmt: skip
    left, scores = products.visual, products.scores
    if own_scores:
        left, scores = visual_of_own_scores(problem, steps, visual, save_scores=save_scores)
    elif problem.factored:
        assert products.scores is not None and problem.visual_key is not None and problem.visual_value is not None
        left, scores = core_forward(
            products.scores, problem.visual_key, problem.visual_value, segments, visual,
            value_position=problem.value_position is not None, save_scores=save_scores,
        )  # fmt: skip
    y = steps.output(
        products.hidden,
        problem.value,
        problem.value_bias,
        left,
        value_memory,
        dense if problem.factored else segments,
        problem.residual,
        x,
    )
    return y, products.pre, scores
