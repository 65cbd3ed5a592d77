"""TMA descriptors: which operands can have one, and how it is made.

What a layout decides is remembered by shape and strides, and an address is looked at in every call. The caches hold no tensor and no
address, so they cannot go stale.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from memvp_kernels.backends.triton.device.operands import POINTER, TMA, TMA_TRANSPOSED
from memvp_kernels.backends.triton.heuristics.tiles import CACHE_SIZE

__all__ = ["can_pair", "load_mode", "make_descriptor", "make_pair_descriptor", "refuse_pairs", "supports_tma"]

_LARGEST_STRIDE = 2**40  # bytes, cuTensorMapEncodeTiled


def supports_tma(tensor: Tensor) -> bool:
    """Whether TMA can read this tensor: contiguous last dimension, base and other strides multiples of 16 bytes, not empty."""
    return tensor.data_ptr() % 16 == 0 and _mode(tensor.shape, tensor.stride(), tensor.element_size()) == TMA.value


def load_mode(tensor: Tensor | None, device_has_tma: bool = True) -> int:
    """TMA, TMA_TRANSPOSED or POINTER for a matrix: how `operands.load_tile` can read it."""
    if tensor is None or not device_has_tma or tensor.data_ptr() % 16:
        return POINTER.value
    return _mode(tensor.shape, tensor.stride(), tensor.element_size())


@functools.lru_cache(CACHE_SIZE)
def _mode(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int:
    """`load_mode` of an aligned tensor with elements of `size` bytes."""
    if _has_tma_layout(shape, strides, size):
        return TMA.value
    transposed = len(shape) == 2 and _has_tma_layout(shape[::-1], strides[::-1], size)
    return TMA_TRANSPOSED.value if transposed else POINTER.value


def _has_tma_layout(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    if strides[-1] != 1 or 0 in shape:
        return False
    outer = (stride * size for stride, count in zip(strides[:-1], shape, strict=False) if count > 1)
    return all(0 < step < _LARGEST_STRIDE and step % 16 == 0 for step in outer)


def make_descriptor(
    tensor: Tensor | None, block: tuple[int, ...], mode: int = TMA.value
) -> Tensor | TensorDescriptor | None:
    """The kernel's argument for an operand that is loaded in this mode; `block` is the tile in the operand's own order."""
    if tensor is None or mode == POINTER.value:
        return tensor
    return _descriptor(tensor, _fields(tensor.shape, tensor.stride(), tensor.element_size(), block, mode))


@functools.lru_cache(CACHE_SIZE)
def _fields(
    shape: tuple[int, ...], strides: tuple[int, ...], size: int, block: tuple[int, ...], mode: int
) -> dict[str, list[int]]:
    """What a descriptor holds besides its base; nobody changes it."""
    if mode == TMA_TRANSPOSED.value:
        shape, strides, block = shape[::-1], strides[::-1], block[::-1]
    # The stride of a dimension of size 1 may be anything, but TMA checks it all the same.
    unit = 16 // size
    row = -(-shape[-1] // unit) * unit
    outer = [row if n == 1 else s for s, n in zip(strides[:-1], shape, strict=False)]
    return {"shape": list(shape), "strides": [*outer, 1], "block_shape": list(block)}


def _descriptor(base: Tensor, fields: dict[str, list[int]]) -> TensorDescriptor:
    """Without Triton's own checks, which take many times as long and which `_mode` made once."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=base)
    return descriptor


_pairs_refused = False


def refuse_pairs() -> None:
    """The driver has refused a descriptor over two allocations: make no more of them in this process."""
    global _pairs_refused
    _pairs_refused = True


def can_pair(first: Tensor, second: Tensor) -> bool:
    """Whether one descriptor can span two matrices of one layout, wherever the allocator put them."""
    if _pairs_refused:
        return False
    distance = abs(first.data_ptr() - second.data_ptr())
    same = first.shape == second.shape and first.stride() == second.stride() and first.dtype == second.dtype
    return same and 0 < distance < _LARGEST_STRIDE and distance % 16 == 0 and supports_tma(first)


def make_pair_descriptor(first: Tensor, second: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """One descriptor (2, rows, columns) over two separate matrices, the one at the lower address in front.

    A descriptor needs a stride between them, not one allocation. A tile of both then arrives as one operand and feeds one wide
    accumulator, and the weights are not packed.
    """
    low, high = (first, second) if first.data_ptr() < second.data_ptr() else (second, first)
    distance = (high.data_ptr() - low.data_ptr()) // low.element_size()
    one = _fields(low.shape, low.stride(), low.element_size(), block, TMA.value)
    fields = {"shape": [2, *one["shape"]], "strides": [distance, *one["strides"]], "block_shape": [2, *block]}
    return _descriptor(low, fields)
