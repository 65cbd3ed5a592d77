"""A memory's key under a feature map, φ(Kv): formed for every image in float32, rounded once, and its gradient taken back to its parts.

Backends get it as `Problem.key_operand`. A factored key has to be multiplied out for it; the value side stays factored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.problem import Problem

__all__ = ["key_of", "mapped", "needs_of_backend", "with_key", "with_key_gradients"]

#: The parts of Kv.
_PARTS = frozenset(("visual_key", "visual_basis", "key_position", "core"))


def key_of(visual_key: Tensor, basis: Tensor | None, position: Tensor | None) -> Tensor:
    """Kv (R, M, d), in float32 at least."""
    dtype = torch.promote_types(visual_key.dtype, torch.float32)
    key = visual_key.to(dtype)
    if basis is not None:
        key = key @ basis.to(dtype)
    return key if position is None else key + position.to(dtype)


def mapped(key: Tensor) -> Tensor:
    """φ(Kv)."""
    return F.silu(key)


def with_key(problem: Problem) -> Problem:
    """The problem with φ(Kv) in x's dtype."""
    assert problem.visual_key is not None
    key = key_of(problem.visual_key, problem.visual_basis, problem.key_position)
    return replace(problem, key_operand=mapped(key).to(problem.x.dtype))


def needs_of_backend(wanted: Collection[str]) -> frozenset[str]:
    """What a backend is asked for: for the parts of Kv the gradient of φ(Kv); of what is a part of Vv too, it gives that share."""
    needs = frozenset(wanted)
    return needs if needs.isdisjoint(_PARTS) else needs - {"visual_key", "key_position"} | {"key_operand"}


def with_key_gradients(problem: Problem, grads: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """The gradients of `wanted`: those from a backend, with the share that passes through φ(Kv)."""
    found = dict(grads)
    dmapped = found.pop("key_operand", None)
    if dmapped is None:
        return found
    assert problem.visual_key is not None
    key = key_of(problem.visual_key, problem.visual_basis, problem.key_position)
    # Slots that nobody reads may hold NaN, and have a gradient of zero.
    unread = dmapped == 0
    dkey = torch.ops.aten.silu_backward(dmapped.to(key.dtype), key).masked_fill_(unread, 0)
    if "key_position" in wanted:
        found["key_position"] = dkey.sum(0)
    share, basis = dkey, problem.visual_basis
    if basis is not None:
        share = dkey @ basis.to(key.dtype).T
        if "visual_basis" in wanted:
            core = problem.visual_key.to(key.dtype).masked_fill(unread.all(-1, keepdim=True), 0)
            found["visual_basis"] = found["visual_basis"] + core.flatten(0, 1).T @ dkey.flatten(0, 1)
    if "visual_key" in wanted:
        found["visual_key"] = share
    if "core" in wanted:
        found["core"] = found["core"] + share
    return found
