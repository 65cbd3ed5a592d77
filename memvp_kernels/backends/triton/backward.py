"""The backward in Triton: the gradients of hidden and input, and a launch for the memory's own gradients.

A factored memory adds the backward of its core kernel, trained weights PyTorch's products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memvp_kernels.backends.torch import eager
from memvp_kernels.backends.triton.forward import is_trivial, is_unread, visual_of, without_memory
from memvp_kernels.backends.triton.gemm import GemmSteps, choose_steps
from memvp_kernels.backends.triton.kernels.core import core_forward
from memvp_kernels.backends.triton.kernels.core_backward import CoreGradients, core_backward
from memvp_kernels.backends.triton.kernels.dhidden import HiddenGradients
from memvp_kernels.backends.triton.kernels.dmemory import Pair, core_gradient, dense_gradients, memory_gradients
from memvp_kernels.backends.triton.kernels.materialise import (
    dense_segments,
    key_operand,
    materialise_memory,
    shared_operand,
    value_operand,
)
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.backends.triton.scores import has_own_scores, mapped_gradients, own_scores, with_theta
from memvp_kernels.backends.triton.weight_gradients import weight_gradients
from memvp_kernels.problem import BEHIND_PRE, BEHIND_SCORES, BEHIND_VISUAL, MEMORY, SHARED, Problem

__all__ = ["backward"]

_NO_SUMS: Mapping[str, Tensor] = {}


def backward(
    problem: Problem,
    grad: Tensor,
    pre: Tensor | None,
    scores: Tensor | None,
    needs: frozenset[str],
    sums: Mapping[str, Tensor] = _NO_SUMS,
    *,
    steps: GemmSteps | None = None,
) -> dict[str, Tensor]:
    """The gradients named by `needs`, each with its argument's shape and dtype (see `Problem`'s contract); those of `SHARED` in float32.

    Args:
        sums: by the names of `SHARED`: what their gradients are added to, in place.
        grad: dy (N, d), any strides.
        pre, scores: as the forward saved them, or None where it saved nothing: then the forward's kernels recompute them.
        steps: what computes the large products; None: the cost model's choice.
    """
    if is_trivial(problem):
        return eager.backward(problem, grad, pre, scores, needs, sums)
    if is_unread(problem):
        nothing = {n: _zeros(problem, n, sums) for n in needs.intersection(MEMORY)}
        return backward(without_memory(problem), grad, pre, None, needs.difference(MEMORY), steps=steps) | nothing

    steps = choose_steps(problem) if steps is None else steps
    grad = _with_rows(grad)
    through_ffn = problem.key is not None and not needs.isdisjoint(BEHIND_PRE)
    through_memory = problem.has_memory and not needs.isdisjoint(BEHIND_SCORES | BEHIND_VISUAL)
    # Recomputed pre-activations can be overwritten by their gradients.
    overwrite = pre is None and "value" not in needs
    pre, scores = _saved_or_recomputed(
        problem, steps, pre, scores, need_pre=through_ffn or "value" in needs, need_scores=through_memory
    )
    used = pre if through_ffn else None, scores if through_memory else None
    if problem.factored and through_memory:
        dpre, grads = _factored_backward(problem, steps, grad, *used, needs, overwrite, sums)
    else:
        dpre, grads = _plain_backward(problem, steps, grad, *used, needs, overwrite, sums)
    grads |= weight_gradients(problem, grad, pre, dpre, needs)
    return {name: g if name in SHARED else g.to(getattr(problem, name).dtype) for name, g in grads.items()}


def _zeros(problem: Problem, name: str, sums: Mapping[str, Tensor]) -> Tensor:
    """The gradient of a memory that nobody reads."""
    like: Tensor = getattr(problem, name)
    return sums.get(name, torch.zeros_like(like, dtype=torch.float32 if name in SHARED else None))


def _with_rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows: a copy of an expanded or transposed one costs less than reading it element by element."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _saved_or_recomputed(
    problem: Problem, steps: GemmSteps, pre: Tensor | None, scores: Tensor | None, *, need_pre: bool, need_scores: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Pre-activations and scores, recomputed where they are needed and were not saved."""
    recompute_pre, recompute_scores = need_pre and pre is None, need_scores and scores is None
    if recompute_scores and has_own_scores(problem):
        scores, recompute_scores = own_scores(problem, steps, visual_of(problem)), False
    if recompute_pre or recompute_scores:
        segments, memory = problem.segments, None
        if recompute_scores and problem.factored:
            segments = dense_segments(problem.rows)
            memory = key_operand(problem)[None]
        elif recompute_scores:
            assert problem.visual_key is not None
            descriptors = launch.has_tma(problem.x.device)
            memory = materialise_memory(
                problem.visual_key, problem.key_position, None, problem.x.dtype, descriptors=descriptors
            )
        products = steps.hidden(
            problem.x, problem.key if recompute_pre else None, problem.gate if recompute_pre else None, problem.key_bias, problem.gate_bias,
            problem.activation, memory, segments, None, save_hidden=recompute_pre, save_scores=recompute_scores, need_hidden=False,
        )  # fmt: skip
        pre = products.pre if recompute_pre else pre
        if recompute_scores:
            scores = products.scores
            if problem.factored:
                assert scores is not None and problem.visual_key is not None and problem.visual_value is not None
                _, scores = core_forward(
                    scores, problem.visual_key, problem.visual_value, problem.segments, visual_of(problem),
                    value_position=False, save_scores=True,
                )  # fmt: skip
    return pre if pre is None else pre.contiguous(), scores if scores is None else scores.contiguous()


def _plain_backward(
    problem: Problem,
    steps: GemmSteps,
    grad: Tensor,
    pre: Tensor | None,
    scores: Tensor | None,
    needs: frozenset[str],
    overwrite: bool,
    sums: Mapping[str, Tensor],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """dpre, and the gradients of x and of a memory that is d wide; pre and scores are None where nothing behind them is needed."""
    x, segments, dtype = problem.x, problem.segments, problem.x.dtype
    descriptors = launch.has_tma(x.device)
    value_memory = None
    if scores is not None and not needs.isdisjoint(BEHIND_SCORES):
        assert problem.visual_value is not None
        value_memory = materialise_memory(
            problem.visual_value, problem.value_position, None, dtype, descriptors=descriptors
        )
    hidden = HiddenGradients(None, None, None, None)
    if pre is not None or scores is not None:
        hidden = steps.dhidden(
            grad, problem.value if pre is not None else None, pre, problem.activation, value_memory, problem.memories, scores, segments,
            with_theta(problem, scores, visual_of(problem)) if scores is not None else None,
            need_visual=not needs.isdisjoint(BEHIND_VISUAL), overwrite=overwrite,
        )  # fmt: skip

    grads: dict[str, Tensor] = {}
    mapped = problem.visual_map is not None
    dscores = None if mapped else hidden.dscores
    if "x" in needs and (hidden.dpre is not None or not mapped):
        key_memory = None
        if dscores is not None:
            assert problem.visual_key is not None
            key_memory = materialise_memory(
                problem.visual_key, problem.key_position, segments.lengths, dtype, descriptors=descriptors
            )
        grads["x"] = steps.dinput(hidden.dpre, problem.key, problem.gate, dscores, key_memory, segments, x)
    if mapped and hidden.dscores is not None:
        grads |= mapped_gradients(problem, steps, hidden.dscores, grads.get("x"), needs, sums)

    # Each side's left and right operand: dKv = dSᵀ x, dVv = visualᵀ dy.
    sides: dict[str, Pair] = {}
    if dscores is not None:
        sides["key"] = (dscores, _with_rows(x))
    if hidden.visual is not None:
        sides["value"] = (hidden.visual, grad)
    together = "core" in needs
    memory = {f"visual_{side}": operands for side, operands in sides.items() if together or f"visual_{side}" in needs}
    if memory:
        dtypes = {getattr(problem, name).dtype for name in memory}
        out = dtypes.pop() if len(dtypes) == 1 and not together else torch.float32
        grads |= zip(memory, memory_gradients(list(memory.values()), segments, problem.memories, out), strict=True)
    # A position's gradient is the sum of its memory's over the images; where that was rounded to 16 bits, the product over all their rows.
    dense = {}
    for side, operands in sides.items():
        if f"{side}_position" not in needs:
            continue
        summand = grads.get(f"visual_{side}")
        if summand is not None and summand.dtype == torch.float32:
            grads[f"{side}_position"] = summand.sum(0)
        else:
            dense[f"{side}_position"] = operands
    if dense:
        grads |= zip(dense, _over_readers(problem, list(dense.values())), strict=True)
    if together:
        of_value = grads.pop("visual_value")
        grads["core"] = of_value if mapped else grads.pop("visual_key").add_(of_value)
    return hidden.dpre, grads


def _factored_backward(
    problem: Problem,
    steps: GemmSteps,
    grad: Tensor,
    pre: Tensor | None,
    scores: Tensor | None,
    needs: frozenset[str],
    overwrite: bool,
    sums: Mapping[str, Tensor],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """As `_plain_backward` for a factored memory: every d-wide operand and gradient is shared by the batch, an image has its cores'."""
    x, dtype, rank = problem.x, problem.x.dtype, problem.rank
    basis, key_core, value_core = problem.visual_basis, problem.visual_key, problem.visual_value
    assert scores is not None and basis is not None and key_core is not None and value_core is not None
    dense = dense_segments(problem.rows)
    need_key, need_value = not needs.isdisjoint(BEHIND_SCORES), not needs.isdisjoint(BEHIND_VISUAL)

    operand = None
    if need_key:
        operand = value_operand(problem)[None]
    elif "visual_value" in needs:
        operand = shared_operand(basis, None, dtype)[None]
    e = dpre = None
    if pre is not None or operand is not None:
        hidden = steps.dhidden(
            grad, problem.value if pre is not None else None, pre, problem.activation, operand, 1, None, dense, None,
            need_visual=False, overwrite=overwrite,
        )  # fmt: skip
        e, dpre = hidden.columns, hidden.dpre
    mapped = problem.visual_map is not None
    core = core_backward(
        e if need_key else None, scores, key_core, value_core, problem.segments, with_theta(problem, scores, visual_of(problem)),
        need_key=need_key, need_value=need_value, through_key=not mapped and not needs.isdisjoint(("x", "visual_basis", "key_operand")),
        through_value=not needs.isdisjoint(("visual_basis", "value_operand")),
    )  # fmt: skip

    grads: dict[str, Tensor] = {}
    if mapped:
        if "x" in needs and dpre is not None:
            grads["x"] = steps.dinput(dpre, problem.key, problem.gate, None, None, dense, x)
        if core.key is not None:
            grads |= mapped_gradients(problem, steps, core.key[:, rank:], grads.get("x"), needs, sums)
    elif "x" in needs:
        assert core.key is not None
        left = core.key if problem.key_position is not None else core.key[:, :rank]
        right = key_operand(problem)[None]
        grads["x"] = steps.dinput(dpre, problem.key, problem.gate, left, right, dense, x)

    if "core" in needs:
        assert core.value is not None and e is not None
        total, of_value = sums.get("core"), (core.value[:, rank:], e[:, :rank])
        if mapped:
            grads["core"] = memory_gradients([of_value], problem.segments, problem.memories, torch.float32, [total])[0]
        else:
            assert core.key is not None
            pairs = (core.key[:, rank:], _through_basis(problem, steps)), of_value
            grads["core"] = core_gradient(pairs, problem.segments, problem.memories, total)
    cores = {}
    if "visual_key" in needs:
        assert core.key is not None
        cores["visual_key"] = (core.key[:, rank:], _through_basis(problem, steps))
    if "visual_value" in needs:
        assert core.value is not None and e is not None
        cores["visual_value"] = (core.value[:, rank:], e[:, :rank])
    if cores:
        dtypes = {getattr(problem, name).dtype for name in cores}
        out = dtypes.pop() if len(dtypes) == 1 else torch.float32
        grads |= zip(
            cores, memory_gradients(list(cores.values()), problem.segments, problem.memories, out), strict=True
        )
    grads |= _operand_gradients(problem, grad, core, needs, sums)
    return dpre, grads | _shared_gradients(problem, grad, core, needs)


def _over_readers(problem: Problem, pairs: list[Pair], totals: Sequence[Tensor | None] = (None, None)) -> list[Tensor]:
    """leftᵀ right over all rows that read a memory, in float32 and added to the totals where there are any."""
    return dense_gradients(pairs, problem.segments, problem.memories, problem.slots, torch.float32, totals)


def _through_basis(problem: Problem, steps: GemmSteps) -> Tensor:
    """x Wᵀ (N, r), recomputed: it is not saved."""
    assert problem.visual_basis is not None
    basis = shared_operand(problem.visual_basis, None, problem.x.dtype)[None]
    products = steps.hidden(
        problem.x, None, None, None, None, problem.activation, basis, dense_segments(problem.rows), None,
        save_hidden=False, save_scores=True,
    )  # fmt: skip
    assert products.scores is not None
    return products.scores


def _operand_gradients(
    problem: Problem, grad: Tensor, core: CoreGradients, needs: frozenset[str], sums: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gradients of [W; p^k] and [W; p^v], whole: [t | dS]ᵀ x and [u | visual]ᵀ dy over the rows that read a memory."""
    pairs: dict[str, Pair] = {}
    for name, left, right in (("key_operand", core.key, problem.x), ("value_operand", core.value, grad)):
        if name in needs and not (name == "key_operand" and problem.visual_map is not None):
            assert left is not None
            pairs[name] = (left, _with_rows(right))
    if not pairs:
        return {}
    totals = [sums.get(name) for name in pairs]
    if len({total is None for total in totals}) == 2:  # one launch adds to both or to none
        return {n: _over_readers(problem, [pair], [sums.get(n)])[0] for n, pair in pairs.items()}
    return dict(zip(pairs, _over_readers(problem, list(pairs.values()), totals), strict=True))


def _shared_gradients(problem: Problem, grad: Tensor, core: CoreGradients, needs: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of the basis and the positions: [t | dS]ᵀ x and [u | visual]ᵀ dy, the columns that are asked for."""
    rank = problem.rank
    first = 0 if "visual_basis" in needs else rank
    products = {}
    for side, left, right in (("key", core.key, problem.x), ("value", core.value, grad)):
        end = rank + problem.slots if f"{side}_position" in needs else rank
        if first < end and not (side == "key" and problem.visual_map is not None):
            assert left is not None
            products[side] = (left[:, first:end], _with_rows(right))
    pairs = list(products.values())
    if len(pairs) == 2 and pairs[0][0].shape != pairs[1][0].shape:
        sums = [_over_readers(problem, [pair])[0] for pair in pairs]
    else:
        sums = _over_readers(problem, pairs) if pairs else []
    found = dict(zip(products, sums, strict=True))
    grads = {f"{side}_position": g[rank - first :] for side, g in found.items() if f"{side}_position" in needs}
    if "visual_basis" in needs:
        of_value = found["value"][:rank]
        grads["visual_basis"] = found["key"][:rank] + of_value if "key" in found else of_value
    return grads
