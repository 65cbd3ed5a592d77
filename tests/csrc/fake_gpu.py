"""Problems whose tensors say they are on a GPU, so that the Python side of the cuda backend runs where there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.arguments import TENSORS, check_scalars, check_tensors
from memvp_kernels.ops import normalise
from memvp_kernels.problem import Problem

DEVICE = torch.device("cuda", 0)


class OnGPU:
    """A CPU tensor that gives its device as cuda:0; everything else is the tensor's own."""

    device = DEVICE

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def contiguous(self) -> OnGPU:
        return self if self.tensor.is_contiguous() else OnGPU(self.tensor.contiguous())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def problem_of(
    *, activation: str = "silu", visual_activation: str | None = None, visual_scale: float = 1.0, **tensors: Any
) -> Problem:
    """The Problem that `fused_ffn` makes of these arguments, on the CPU."""
    check_scalars(activation, visual_activation, visual_scale, 0.0, False, "cuda")
    given = {name: tensors.pop(name, None) for name in TENSORS}
    assert not tensors, f"unknown arguments {sorted(tensors)}"
    check_tensors(given)
    scalars = {
        "activation": activation,
        "visual_activation": visual_activation or activation,
        "visual_scale": visual_scale,
        "dropout_p": 0.0,
    }
    return normalise(given, scalars)


def on_gpu(problem: Problem, **changes: Any) -> Problem:
    """The problem with every tensor on the pretended GPU, and some fields changed."""
    segments = dataclasses.replace(problem.segments, **_moved(problem.segments))
    return dataclasses.replace(problem, **{**_moved(problem), "segments": segments, **changes})


def _moved(fields: Any) -> dict[str, Any]:
    found = {field.name: getattr(fields, field.name) for field in dataclasses.fields(fields)}
    return {name: OnGPU(value) for name, value in found.items() if isinstance(value, Tensor)}
