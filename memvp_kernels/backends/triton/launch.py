"""The host's side of a launch: which device, which dtype and precision, and whether an operand can have a TMA descriptor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memvp_kernels.backends.triton.operands import BY_COLUMN, BY_POINTER, BY_ROW
from memvp_kernels.backends.triton.shape import Shape
from memvp_kernels.backends.triton.tiles import Chip, chip_of
from memvp_kernels.precision import tf32_allowed
from memvp_kernels.problem import Segments

__all__ = [
    "architecture",
    "chip",
    "describable",
    "describe",
    "describe_pair",
    "element_type",
    "empty_rows",
    "form_of",
    "has_tma",
    "interpreted",
    "on_device",
    "pairable",
    "precision",
    "shape_of",
]

_ELEMENT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LARGEST_STRIDE = 2**40  # bytes, cuTensorMapEncodeTiled
_INTERPRETED_AS = 90


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


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


@contextlib.contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's own device; Triton takes that device's current stream."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def describable(tensor: Tensor) -> bool:
    """Whether TMA can read this tensor: contiguous last dimension, base and other strides multiples of 16 bytes, not empty."""
    *outer, inner = tensor.stride()
    if inner != 1 or tensor.data_ptr() % 16 or tensor.numel() == 0:
        return False
    size = tensor.element_size()
    walked = (stride * size for stride, count in zip(outer, tensor.shape, strict=False) if count > 1)
    return all(0 < step < _LARGEST_STRIDE and step % 16 == 0 for step in walked)


def form_of(tensor: Tensor, device_has_tma: bool = True) -> int:
    """BY_ROW, BY_COLUMN or BY_POINTER for a matrix: how `operands.load_tile` can read it."""
    if device_has_tma and describable(tensor):
        return BY_ROW.value
    if device_has_tma and tensor.dim() == 2 and describable(tensor.T):
        return BY_COLUMN.value
    return BY_POINTER.value


def describe(tensor: Tensor, block: Sequence[int], form: int = BY_ROW.value) -> Tensor | TensorDescriptor:
    """The kernel's argument for an operand in this form; `block` is the tile in the operand's own order."""
    if form == BY_POINTER.value:
        return tensor
    if form == BY_COLUMN.value:
        tensor, block = tensor.T, block[::-1]
    shape = list(tensor.shape)
    # The stride of a dimension of size 1 is never walked and may be anything, but TMA checks it all the same.
    unit = 16 // tensor.element_size()
    row = -(-shape[-1] // unit) * unit
    strides = [row if n == 1 else s for s, n in zip(tensor.stride(), shape, strict=True)]
    strides[-1] = 1
    return TensorDescriptor(tensor, shape, strides, list(block))


def pairable(first: Tensor, second: Tensor) -> bool:
    """Whether one descriptor can span two matrices of one layout, wherever the allocator put them."""
    distance = abs(first.data_ptr() - second.data_ptr())
    same = first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    return same and describable(first) and describable(second) and 0 < distance < _LARGEST_STRIDE


def describe_pair(first: Tensor, second: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """One descriptor (2, rows, columns) over two separate matrices, the one at the lower address in front.

    A descriptor needs a stride between them, not one allocation, so a tile of both arrives as one operand and feeds one wide
    accumulator without packing the weights.
    """
    low, high = (first, second) if first.data_ptr() < second.data_ptr() else (second, first)
    distance = (high.data_ptr() - low.data_ptr()) // low.element_size()
    return TensorDescriptor(low, [2, *low.shape], [distance, *low.stride()], [2, *block])


def empty_rows(rows: int, columns: int, like: Tensor, *, zero: bool = False) -> Tensor:
    """(rows, columns) in `like`'s dtype whose rows start at multiples of 16 elements, whatever the width.

    TMA asks for 16 bytes; Triton vectorises pointers whose stride it knows to be a multiple of 16.
    """
    make = torch.zeros if zero else torch.empty
    return make(rows, -(-columns // 16) * 16, dtype=like.dtype, device=like.device)[:, :columns]
