"""The visual branch of MemVP's relatives: scores under a feature map, and scores of which each row drops its lowest.

The order statistic needs a whole row of scores, and a map other operands than the FFN's, so the scores have launches of their own, which a
recomputation repeats to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.gemm import GemmSteps
from memvp_kernels.backends.triton.kernels.activation import activation_backward, activation_forward
from memvp_kernels.backends.triton.kernels.core import core_forward
from memvp_kernels.backends.triton.kernels.dmemory import memory_gradients
from memvp_kernels.backends.triton.kernels.drop import dropped_visual, thresholds
from memvp_kernels.backends.triton.kernels.hidden import Products
from memvp_kernels.backends.triton.kernels.materialise import dense_segments, key_operand, materialise_memory
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Problem, Segments

__all__ = ["has_own_scores", "mapped_gradients", "own_scores", "visual_of_own_scores", "with_theta"]


def has_own_scores(problem: Problem) -> bool:
    """Whether the problem has a memory whose scores take launches of their own."""
    return problem.has_memory and (problem.visual_map is not None or _drops(problem))


def _drops(problem: Problem) -> bool:
    return int(problem.visual_drop * problem.slots) > 0


def _query(problem: Problem) -> Tensor:
    """φ(x), or x."""
    x = problem.x
    return x if problem.visual_map is None else activation_forward(x.contiguous()[None], problem.visual_map)


def _key_memory(problem: Problem, lengths: Tensor | None = None) -> Tensor:
    """Kv or φ(Kv) (R, M, d), zero past the lengths where they are given."""
    mapped = problem.visual_map is not None
    memory, position = (problem.key_operand, None) if mapped else (problem.visual_key, problem.key_position)
    assert memory is not None
    return materialise_memory(memory, position, lengths, problem.x.dtype, descriptors=launch.has_tma(problem.x.device))


def _launch_scores(
    problem: Problem, steps: GemmSteps, memory: Tensor, segments: Segments, visual: Visual | None, *, save_scores: bool
) -> Products:
    return steps.hidden(
        _query(problem), None, None, None, None, problem.activation, memory, segments, visual, save_hidden=False, save_scores=save_scores
    )  # fmt: skip


def own_scores(problem: Problem, steps: GemmSteps, visual: Visual) -> Tensor:
    """The scores (N, M), contiguous, as they are kept for the backward."""
    if problem.visual_map is not None or not problem.factored:
        scores = _launch_scores(problem, steps, _key_memory(problem), problem.segments, None, save_scores=True).scores
    else:
        operand, dense = key_operand(problem)[None], dense_segments(problem.rows)
        c = _launch_scores(problem, steps, operand, dense, None, save_scores=True).scores
        assert c is not None
        _, scores = core_forward(c, problem.visual_key, None, problem.segments, visual, save_scores=True)
    assert scores is not None
    return scores.contiguous()


def with_theta(problem: Problem, scores: Tensor | None, visual: Visual) -> Visual:
    """`visual` with each row's θ, where scores are dropped."""
    if scores is None or not _drops(problem):
        return visual
    return visual._replace(theta=thresholds(scores, problem.segments, problem.memories, problem.visual_drop))


def visual_of_own_scores(
    problem: Problem, steps: GemmSteps, visual: Visual, *, save_scores: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What the output kernel multiplies by the values, visual (N, M) or [visual A | visual] (N, r + M) of a factored memory; the scores."""
    segments = problem.segments
    if not problem.factored and not _drops(problem):  # a score's visual activation depends on nothing else
        products = _launch_scores(problem, steps, _key_memory(problem), segments, visual, save_scores=save_scores)
        return products.visual, products.scores
    scores = own_scores(problem, steps, visual)
    if problem.factored:
        left, _ = core_forward(
            scores, None, problem.visual_value, segments, with_theta(problem, scores, visual), value_position=problem.value_position is not None
        )  # fmt: skip
    else:
        left = dropped_visual(scores, segments, problem.memories, problem.visual_drop, visual)
    return left, scores if save_scores else None


def mapped_gradients(
    problem: Problem,
    steps: GemmSteps,
    dscores: Tensor,
    dinput: Tensor | None,
    needs: frozenset[str],
    sums: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradients of x and of φ(Kv), both through φ(x) φ(Kv)ᵀ.

    Args:
        dscores: (N, M).
        dinput: the FFN's own share of x's gradient, to which the other is added in place.
    """
    assert problem.visual_map is not None
    x, segments = problem.x, problem.segments
    grads: dict[str, Tensor] = {}
    if "x" in needs:
        dquery = steps.dinput(None, None, None, dscores, _key_memory(problem, segments.lengths), segments, x)
        activation_backward(dquery, x.contiguous()[None], dquery[None], problem.visual_map)
        grads["x"] = dquery if dinput is None else dinput.add_(dquery)
    if "key_operand" in needs:
        total = sums.get("key_operand")
        (grads["key_operand"],) = memory_gradients(
            [(dscores, _query(problem))], segments, problem.memories, torch.float32, [total]
        )
    return grads
