"""Pointers of an interpreted kernel, which reach one tensor each and nothing beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from tests.triton.gluon.machine import current, where
from tests.triton.gluon.values import Scalar, as_tensor, common_layout, gluon_dtype, wrap

__all__ = ["Pointer"]


class Pointer:
    """Addresses in elements of one tensor that was passed to the kernel."""

    def __init__(self, flat: Tensor, low: int, high: int, offset: Tensor, layout: Any = None) -> None:
        """Args: flat: the tensor's whole storage; low, high: the tensor's own elements in it; offset: int64."""
        self.flat, self.low, self.high, self.offset, self.layout = flat, low, high, offset, layout

    @classmethod
    def to_tensor(cls, tensor: Tensor) -> Pointer:
        first = int(tensor.storage_offset())
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = tensor.detach().as_strided((elements,), (1,), 0)
        return cls(flat, first, first + size, torch.tensor(first, dtype=torch.int64))

    @property
    def rank(self) -> int:
        return self.offset.dim()

    @property
    def shape(self) -> list[int]:
        return list(self.offset.shape)

    @property
    def dtype(self) -> Any:
        return gl.pointer_type(gluon_dtype(self.flat.dtype))

    def __add__(self, other: Any) -> Pointer:
        layout = common_layout([self, other])
        return Pointer(self.flat, self.low, self.high, self.offset + as_tensor(other).to(torch.int64), layout)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self + -as_tensor(other).to(torch.int64)

    def _touched(self, mask: Any) -> tuple[Tensor, Tensor]:
        common_layout([self, mask])
        wanted = torch.ones((), dtype=torch.bool) if mask is None else as_tensor(mask, torch.bool)
        offset, wanted = torch.broadcast_tensors(self.offset, wanted)
        outside = wanted & ((offset < self.low) | (offset >= self.high))
        if outside.any():
            bad = int(offset[outside].flatten()[0]) - self.low
            raise IndexError(f"{where()}: element {bad} of a tensor of {self.high - self.low}")
        return offset, wanted

    def load(self, mask: Any = None, other: Any = None) -> Any:
        offset, wanted = self._touched(mask)
        self._note(offset[wanted], False)
        return self._read(offset, wanted, other)

    def _read(self, offset: Tensor, wanted: Tensor, other: Any = None) -> Any:
        if other is None:  # undefined where masked off
            other = Scalar(math.nan if self.flat.is_floating_point() else 77, self.flat.dtype)
        found = as_tensor(other, self.flat.dtype).expand(offset.shape).clone()
        found[wanted] = self.flat[offset[wanted]]
        return wrap(found, self.layout)

    def store(self, value: Any, mask: Any = None) -> None:
        common_layout([self, value])
        offset, wanted = self._touched(mask)
        self._note(offset[wanted], True)
        values = as_tensor(value, self.flat.dtype).expand(offset.shape)
        self.flat[offset[wanted]] = values[wanted]

    def add(self, value: Any, mask: Any = None) -> Any:
        """An atomic addition; the values before."""
        offset, wanted = self._touched(mask)
        before = self._read(offset, wanted)
        values = as_tensor(value, self.flat.dtype).expand(offset.shape)
        self.flat.index_put_((offset[wanted],), values[wanted], accumulate=True)
        return before

    def _note(self, index: Tensor, write: bool) -> None:
        current().touch(self.flat, index, write, f"{'store' if write else 'load'} at {where()}")
