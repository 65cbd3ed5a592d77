"""What a launch depends on besides its operands: device, number type and precision.

All of it runs before every launch, so it is remembered by device, shape and strides.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.hardware import Chip, chip_of
from memvp_kernels.precision import tf32_allowed
from memvp_kernels.problem import Segments

__all__ = [
    "architecture",
    "chip",
    "element_type",
    "empty_rows",
    "has_tma",
    "interpreted",
    "on_device",
    "precision",
    "programs",
    "shape_of",
    "strides",
]

_ELEMENT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED_AS = 90


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability as a two- or three-digit number (80, 90, 100); the interpreter stands for Hopper."""
    if interpreted():
        return _INTERPRETED_AS
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def chip(device: torch.device) -> Chip:
    """The device as the cost model knows it."""
    return chip_of(architecture(device), _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def has_tma(device: torch.device) -> bool:
    """Whether the device copies tiles by descriptor (Hopper and newer)."""
    return architecture(device) >= 90


def element_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype that the kernels take."""
    return _ELEMENT_TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` treats float32: IEEE, unless the user allowed TF32 for PyTorch's own products."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def shape_of(x: Tensor, pairs: int, slots: int, segments: Segments, *, gated: bool = False, descriptors: bool) -> Shape:
    """A launch over the rows of x, or of what has its shape, as the cost model sees it."""
    rows, width = x.shape
    return Shape(
        x.dtype, precision(x.dtype), rows, width, pairs, slots, segments.sequences, segments.length, gated, descriptors
    )


_NOTHING = contextlib.nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context in which to launch: the tensor's device is the current one. Triton takes that device's current stream."""
    index = tensor.get_device()
    # Entering `device_of` costs microseconds, and nearly every call is on the current device.
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)


def programs(count: int, block: int) -> int:
    """How many blocks hold so many; `triton.cdiv` unwraps constexprs first, which takes many times as long."""
    return -(-count // block)


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The first strides of a kernel's argument; zeros for one that is not there."""
    return tensor.stride()[:dimensions] if tensor is not None else (0,) * dimensions


def empty_rows(rows: int, columns: int, like: Tensor, *, zero: bool = False) -> Tensor:
    """(rows, columns) in `like`'s dtype whose rows start at multiples of 16 elements, whatever the width.

    TMA asks for 16 bytes; Triton vectorises pointers whose stride it knows to be a multiple of 16.
    """
    padded = programs(columns, 16) * 16
    out = like.new_zeros(rows, padded) if zero else like.new_empty(rows, padded)
    return out if padded == columns else out[:, :columns]
