"""The four large steps of one problem, each on the road that the cost model prefers; the forward and the backward run what they are given.

One choice for a problem, whatever is kept or needed of it: pre-activations formed again in the backward are then the forward's, to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TypeAlias

import torch

from memvp_kernels.backends.cuda import gemm as wgmma
from memvp_kernels.backends.triton import gemm_cublas as library
from memvp_kernels.backends.triton.device.operands import BY_POINTER
from memvp_kernels.backends.triton.heuristics import cost_model as roads
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.kernels.dhidden import dhidden_backward
from memvp_kernels.backends.triton.kernels.dinput import dinput_backward
from memvp_kernels.backends.triton.kernels.hidden import hidden_forward
from memvp_kernels.backends.triton.kernels.output import output_forward
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Problem

__all__ = ["ON_ROAD", "Fused", "Library", "Steps", "Wgmma", "forced", "missing", "shape_of", "steps_of"]


class Library:
    """Every step by the library. A step's signature is that of its function here, and its fused twin is checked against it."""

    hidden = staticmethod(library.hidden)
    output = staticmethod(library.output)
    dhidden = staticmethod(library.dhidden)
    dinput = staticmethod(library.dinput)


class Fused(Library):
    """Every step by its fused kernel."""

    hidden = staticmethod(hidden_forward)
    output = staticmethod(output_forward)
    dhidden = staticmethod(dhidden_backward)
    dinput = staticmethod(dinput_backward)


class Wgmma(Library):
    """Every step by the extension's kernels for Hopper, or by its fused twin where they can't take it."""

    hidden = staticmethod(wgmma.hidden)
    output = staticmethod(wgmma.output)
    dhidden = staticmethod(wgmma.dhidden)
    dinput = staticmethod(wgmma.dinput)


#: The functions that compute the steps of a problem.
Steps: TypeAlias = type[Library]

#: Every step on one road, by `roads.ROADS`.
ON_ROAD: dict[str, Steps] = {"fused": Fused, "library": Library, "wgmma": Wgmma}

# Not a context variable: autograd runs a backward on threads of its own, which would not see it.
_forced: str | None = None


@contextlib.contextmanager
def forced(road: str | None) -> Iterator[None]:
    """Within it every step of every problem takes this road of `roads.ROADS`, for tests and benchmarks that compare them; None: the choice."""
    global _forced
    known, _forced = _forced, road
    try:
        yield
    finally:
        _forced = known


def missing(road: str, device: torch.device) -> str | None:
    """Why every step of a road would be its fused twin's on this device; None: not so."""
    if road == "wgmma":
        return wgmma.missing(device)
    return None


def steps_of(problem: Problem) -> Steps:
    """The steps of this problem."""
    if _forced is not None:
        return ON_ROAD[_forced]
    return _chosen(roads.choice(launch.chip(problem.x.device), shape_of(problem)))


@functools.cache
def _chosen(choice: tuple[str, ...]) -> Steps:
    taken = dict(zip(roads.STEPS, choice, strict=True))
    return type("Chosen", (Library,), {step: vars(ON_ROAD[road])[step] for step, road in taken.items()})


def shape_of(problem: Problem) -> Shape:
    """The problem as the cost model sees it."""
    p = problem
    dense = p.factored or p.segments.shared
    slots = p.rank + (p.slots if p.key_position is not None else 0) if p.factored else p.slots
    return Shape(
        dtype=p.x.dtype, precision=launch.precision(p.x.dtype), rows=p.rows, width=p.width, pairs=p.pairs, slots=slots,
        sequences=1 if dense else p.segments.sequences, length=p.rows if dense else p.segments.length, gated=p.gated, dense=dense,
        # One weight speaks for all: they come from one model, and nothing but a prediction hangs on it.
        descriptors=launch.describable(p.x) and (p.key is None or launch.form_of(p.key) != BY_POINTER.value),
    )  # fmt: skip
