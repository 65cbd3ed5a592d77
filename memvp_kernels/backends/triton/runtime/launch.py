"""The host's side of a launch: which device, which dtype and precision, and whether an operand can have a TMA descriptor.

All of it runs before every launch, so what a shape and its strides decide is remembered by them, and an operand's address looked at again:
a cache that holds no tensor and no address can be wrong about none, whatever an optimiser or the allocator did meanwhile.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memvp_kernels.backends.triton.device.operands import BY_COLUMN, BY_POINTER, BY_ROW
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import REMEMBERED, Chip, chip_of
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
    "programs",
    "shape_of",
]

_ELEMENT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_LARGEST_STRIDE = 2**40  # bytes, cuTensorMapEncodeTiled
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


#: The context in which to launch, with the tensor's own device as the current one; Triton takes that device's current stream.
on_device = torch.cuda.device_of


def programs(count: int, block: int) -> int:
    """How many blocks hold so many; `triton.cdiv` unwraps constexprs first, which takes many times as long."""
    return -(-count // block)


def describable(tensor: Tensor) -> bool:
    """Whether TMA can read this tensor: contiguous last dimension, base and other strides multiples of 16 bytes, not empty."""
    return tensor.data_ptr() % 16 == 0 and _form(tensor.shape, tensor.stride(), tensor.element_size()) == BY_ROW.value


def form_of(tensor: Tensor, device_has_tma: bool = True) -> int:
    """BY_ROW, BY_COLUMN or BY_POINTER for a matrix: how `operands.load_tile` can read it."""
    if not device_has_tma or tensor.data_ptr() % 16:
        return BY_POINTER.value
    return _form(tensor.shape, tensor.stride(), tensor.element_size())


@functools.lru_cache(REMEMBERED)
def _form(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int:
    """`form_of` an aligned tensor of elements of `size` bytes."""
    if _walkable(shape, strides, size):
        return BY_ROW.value
    return BY_COLUMN.value if len(shape) == 2 and _walkable(shape[::-1], strides[::-1], size) else BY_POINTER.value


def _walkable(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    if strides[-1] != 1 or 0 in shape:
        return False
    walked = (stride * size for stride, count in zip(strides[:-1], shape, strict=False) if count > 1)
    return all(0 < step < _LARGEST_STRIDE and step % 16 == 0 for step in walked)


def describe(tensor: Tensor, block: tuple[int, ...], form: int = BY_ROW.value) -> Tensor | TensorDescriptor:
    """The kernel's argument for an operand in this form; `block` is the tile in the operand's own order."""
    if form == BY_POINTER.value:
        return tensor
    return _descriptor(tensor, _fields(tensor.shape, tensor.stride(), tensor.element_size(), block, form))


@functools.lru_cache(REMEMBERED)
def _fields(
    shape: tuple[int, ...], strides: tuple[int, ...], size: int, block: tuple[int, ...], form: int
) -> dict[str, list[int]]:
    """What a descriptor holds beside its base; nobody changes it."""
    if form == BY_COLUMN.value:
        shape, strides, block = shape[::-1], strides[::-1], block[::-1]
    # The stride of a dimension of size 1 is never walked and may be anything, but TMA checks it all the same.
    unit = 16 // size
    row = -(-shape[-1] // unit) * unit
    walked = [row if n == 1 else s for s, n in zip(strides[:-1], shape, strict=False)]
    return {"shape": list(shape), "strides": [*walked, 1], "block_shape": list(block)}


def _descriptor(base: Tensor, fields: dict[str, list[int]]) -> TensorDescriptor:
    """Made without Triton's own checks, which take many times as long and which `_form` made once."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    vars(made).update(fields, base=base)
    return made


def pairable(first: Tensor, second: Tensor) -> bool:
    """Whether one descriptor can span two matrices of one layout, wherever the allocator put them."""
    distance = abs(first.data_ptr() - second.data_ptr())
    same = first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    return same and 0 < distance < _LARGEST_STRIDE and distance % 16 == 0 and describable(first)


def describe_pair(first: Tensor, second: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """One descriptor (2, rows, columns) over two separate matrices, the one at the lower address in front.

    A descriptor needs a stride between them, not one allocation, so a tile of both arrives as one operand and feeds one wide
    accumulator without packing the weights.
    """
    low, high = (first, second) if first.data_ptr() < second.data_ptr() else (second, first)
    distance = (high.data_ptr() - low.data_ptr()) // low.element_size()
    fields = {"shape": [2, *low.shape], "strides": [distance, *low.stride()], "block_shape": [2, *block]}
    return _descriptor(low, fields)


def empty_rows(rows: int, columns: int, like: Tensor, *, zero: bool = False) -> Tensor:
    """(rows, columns) in `like`'s dtype whose rows start at multiples of 16 elements, whatever the width.

    TMA asks for 16 bytes; Triton vectorises pointers whose stride it knows to be a multiple of 16.
    """
    make = like.new_zeros if zero else like.new_empty
    padded = programs(columns, 16) * 16
    made = make(rows, padded)
    return made if padded == columns else made[:, :columns]
