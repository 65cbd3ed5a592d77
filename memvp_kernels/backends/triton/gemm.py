"""The four large products of a pass, and which implementation computes them.

    fused    one Triton kernel for the whole step
    cublas   cuBLAS's products, with passes around them (:mod:`.gemm_cublas`)

The cost model chooses for each step. ``MEMVP_GEMM=fused`` or ``MEMVP_GEMM=cublas`` in the environment chooses for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from memvp_kernels.backends.triton import gemm_cublas
from memvp_kernels.backends.triton.device.operands import POINTER
from memvp_kernels.backends.triton.heuristics import cost_model
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.kernels.dhidden import HiddenGradients, dhidden_backward
from memvp_kernels.backends.triton.kernels.dinput import dinput_backward
from memvp_kernels.backends.triton.kernels.hidden import Products, hidden_forward
from memvp_kernels.backends.triton.kernels.output import output_forward
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.problem import Problem

__all__ = ["IMPLEMENTATIONS", "GemmSteps", "choose_steps", "override_implementation", "shape_of"]


class GemmSteps(NamedTuple):
    """What computes each step; the arguments are those of the fused kernels' launchers."""

    hidden: Callable[..., Products]
    output: Callable[..., Tensor]
    dhidden: Callable[..., HiddenGradients]
    dinput: Callable[..., Tensor]


IMPLEMENTATIONS = {
    "fused": GemmSteps(hidden_forward, output_forward, dhidden_backward, dinput_backward),
    "cublas": GemmSteps(gemm_cublas.hidden, gemm_cublas.output, gemm_cublas.dhidden, gemm_cublas.dinput),
}

# Not a context variable: autograd runs a backward on threads of its own, which would not see it.
_override: str | None = os.environ.get("MEMVP_GEMM") or None


@contextlib.contextmanager
def override_implementation(name: str | None) -> Iterator[None]:
    """Within it every step of every problem is computed by this implementation; None: by the cost model's choice."""
    global _override
    known, _override = _override, name
    try:
        yield
    finally:
        _override = known


def choose_steps(problem: Problem) -> GemmSteps:
    """The steps of this problem.

    One choice for a problem, whatever is kept or needed of it: recomputed pre-activations are then the forward's, to the bit.
    """
    if _override is None:
        return _chosen(cost_model.choice(launch.chip(problem.x.device), shape_of(problem)))
    if _override not in IMPLEMENTATIONS:
        raise ValueError(f"MEMVP_GEMM: wanted one of {', '.join(IMPLEMENTATIONS)}, got {_override!r}")
    return IMPLEMENTATIONS[_override]


@functools.cache
def _chosen(names: tuple[str, ...]) -> GemmSteps:
    return GemmSteps(
        *(getattr(IMPLEMENTATIONS[name], step) for step, name in zip(GemmSteps._fields, names, strict=True))
    )


def shape_of(problem: Problem) -> Shape:
    """The problem as the cost model sees it."""
    p = problem
    dense = p.factored or p.segments.shared
    slots = p.rank + (p.slots if p.key_position is not None else 0) if p.factored else p.slots
    return Shape(
        dtype=p.x.dtype, precision=launch.precision(p.x.dtype), rows=p.rows, width=p.width, pairs=p.pairs, slots=slots,
        sequences=1 if dense else p.segments.sequences, length=p.rows if dense else p.segments.length, gated=p.gated, dense=dense,
        # One weight speaks for all: they come from one model, and nothing but a prediction hangs on it.
        descriptors=tma.supports_tma(p.x) and (p.key is None or tma.load_mode(p.key) != POINTER.value),
    )  # fmt: skip
