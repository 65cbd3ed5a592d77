"""Shared memory as bytes, and views of it: an index of a view is an address, by its layout. Unwritten bytes are NaN.

Reading one view's bytes through another is what the hardware would do, so what a kernel claims of two layouts is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import math
import operator
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from tests.triton.gluon.layouts import alignment, offsets
from tests.triton.gluon.machine import Barrier, ProtocolError, current, where
from tests.triton.gluon.races import PIECE_BYTES, Trace
from tests.triton.gluon.values import Block, torch_dtype

__all__ = ["Allocation", "SharedView", "allocate"]

_UNWRITTEN = 0xFF  # NaN in every floating-point type


class Table:
    """Offsets in elements of a view's indices from its base, and what follows from them."""

    def __init__(self, offset: Tensor, itemsize: int) -> None:
        self.offset, self.itemsize = offset, itemsize
        self.extent = int(offset.max()) + 1
        self.derived: dict[Any, Table] = {}

    @functools.cached_property
    def pieces(self) -> np.ndarray | slice:
        """The 16-byte pieces touched; a slice where they lie side by side."""
        pieces = np.unique(self.offset.numpy().reshape(-1) * self.itemsize // PIECE_BYTES)
        first, last = int(pieces[0]), int(pieces[-1])
        return slice(first, last + 1) if last - first + 1 == len(pieces) else pieces

    @functools.cached_property
    def inverse(self) -> Tensor | None:
        """The flat index of each offset, where the view fills its extent."""
        if self.offset.numel() != self.extent:
            return None
        out = torch.empty(self.extent, dtype=torch.int64)
        out[self.offset.reshape(-1)] = torch.arange(self.extent)
        return out

    def permuted(self, order: tuple[int, ...]) -> Table:
        return self._once(("permute", order), lambda: self.offset.permute(order))

    def sliced(self, start: int, length: int, dimension: int) -> Table:
        return self._once((start, length, dimension), lambda: self.offset.narrow(dimension, start, length))

    def _once(self, key: Any, make: Any) -> Table:
        if key not in self.derived:
            self.derived[key] = Table(make().contiguous(), self.itemsize)
        return self.derived[key]


@functools.cache
def _table(layout: Any, shape: tuple[int, ...], dtype: Any) -> Table:
    return Table(offsets(layout, shape, dtype.primitive_bitwidth), dtype.primitive_bitwidth // 8)


class Allocation:
    """Bytes of shared memory, aligned to every swizzle."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.bytes = torch.full((-(-size // PIECE_BYTES) * PIECE_BYTES,), _UNWRITTEN, dtype=torch.uint8)
        self.typed = {torch.uint8: self.bytes}
        self.trace = Trace(name, size)
        # 1 + the partition that wrote there by ordinary stores since its last fence.
        self.unfenced = np.zeros(-(-size // PIECE_BYTES), np.int8)
        self.barriers: dict[int, Barrier] = {}

    def elements(self, dtype: Any) -> Tensor:
        wanted = torch_dtype(dtype)
        if wanted not in self.typed:
            self.typed[wanted] = self.bytes.view(wanted)
        return self.typed[wanted]


def allocate(dtype: Any, shape: Sequence[Any], layout: Any, value: Any = None) -> SharedView:
    sizes = tuple(operator.index(s) for s in shape)
    allocation = Allocation(_name(), math.prod(sizes) * dtype.primitive_bitwidth // 8)
    current().allocations.append(allocation)
    view = SharedView(allocation, 0, dtype, sizes, layout)
    if value is not None:
        view.store(value)
    return view


class SharedView:
    """A typed window on an allocation; its leading dimension may be a ring of tiles, which only `index` enters."""

    def __init__(
        self,
        allocation: Allocation,
        base: int,
        dtype: Any,
        shape: tuple[int, ...],
        layout: Any,
        table: Table | None = None,
    ) -> None:
        self.allocation, self.base, self.dtype, self.layout = allocation, base, dtype, layout
        self._shape, self._derived = shape, table is not None
        self.itemsize = dtype.primitive_bitwidth // 8
        self.ring = len(shape) - _rank(layout)
        if table is None:
            if self.ring < 0:
                raise ValueError(f"shape {list(shape)} for a layout of rank {_rank(layout)}")
            table = _table(layout, shape[self.ring :], dtype)
        self.table = table

    @property
    def shape(self) -> list[int]:
        return list(self._shape)

    @property
    def rank(self) -> int:
        return len(self._shape)

    @property
    def numel(self) -> int:
        return math.prod(self._shape)

    @property
    def type(self) -> Any:
        return gl.shared_memory_descriptor_type(self.dtype, self.shape, self.layout, self.shape)

    def __str__(self) -> str:
        return f"{self.allocation.name}[{self.base}:{self.base + self.numel * self.itemsize}]"

    # Views

    def index(self, index: Any) -> SharedView:
        at = operator.index(index)
        if self.ring < 1:
            raise ValueError(f"{self} of shape {self.shape} has no leading dimension to index")
        if not 0 <= at < self._shape[0]:
            raise IndexError(f"tile {at} of {self._shape[0]} in {self}")
        size = math.prod(self._shape[1:]) * self.itemsize
        return SharedView(self.allocation, self.base + at * size, self.dtype, self._shape[1:], self.layout)

    def permute(self, *order: Any) -> SharedView:
        dimensions = order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order
        dimensions = tuple(operator.index(d) for d in dimensions)
        self._tile()
        shape = tuple(self._shape[d] for d in dimensions)
        layout = self.layout
        if dimensions == (1, 0) and isinstance(layout, gl.NVMMASharedLayout):
            layout = dataclasses.replace(layout, transposed=not layout.transposed)
        return SharedView(self.allocation, self.base, self.dtype, shape, layout, self.table.permuted(dimensions))

    def slice(self, start: int, length: int, dim: int = 0) -> SharedView:
        self._tile()
        if not 0 <= start <= start + length <= self._shape[dim]:
            raise IndexError(f"[{start}, {start + length}) of {self._shape[dim]} in {self}")
        shape = tuple(length if d == dim else n for d, n in enumerate(self._shape))
        table = self.table.sliced(start, length, dim)
        return SharedView(self.allocation, self.base, self.dtype, shape, self.layout, table)

    def reshape(self, shape: Sequence[Any]) -> SharedView:
        sizes = tuple(operator.index(n) for n in shape)
        layout = dataclasses.replace(self.layout, rank=len(sizes))
        out = SharedView(self.allocation, self.base, self.dtype, sizes, layout)
        if not torch.equal(out.table.offset, self.table.offset.reshape(sizes)):
            raise NotImplementedError(f"{self} reshaped from {self.shape} to {list(sizes)} has another kind of layout")
        return out

    def _reinterpret(self, dtype: Any, shape: Sequence[Any], layout: Any) -> SharedView:
        """The same bytes by another layout."""
        if self._derived:
            raise ValueError(f"{self}: only a whole tile or ring can be reinterpreted")
        out = SharedView(self.allocation, self.base, dtype, tuple(operator.index(n) for n in shape), layout)
        if out.numel * out.itemsize > self.numel * self.itemsize:
            raise ValueError(f"{self} reinterpreted as {out.shape} of {dtype}: more bytes than there are")
        return out

    reinterpret = _reinterpret

    def _keep_alive(self) -> None:
        pass

    # Ordinary loads and stores

    def load(self, layout: Any) -> Block:
        me = current().running
        self.access(False, me.agent, me.clock[me.agent])
        return Block(self.read(), layout)

    def store(self, value: Block) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"{value} stored to {self.shape} of {self.dtype}")
        me = current().running
        data = value.data
        self.access(True, me.agent, me.clock[me.agent])
        self.write(data)
        self.allocation.unfenced[self.pieces] = me.index + 1

    # What the above and the asynchronous units need

    def _tile(self) -> None:
        if self.ring:
            raise ValueError(f"{self} of shape {self.shape} is a ring: index it first")

    @property
    def pieces(self) -> Any:
        first = self.base // PIECE_BYTES
        pieces = self.table.pieces
        return slice(pieces.start + first, pieces.stop + first) if isinstance(pieces, slice) else pieces + first

    def access(self, write: bool, agent: int, time: int, what: str = "") -> None:
        """Note an access begun by the running partition, which must know that what conflicts is over."""
        self._tile()
        machine = current()
        if machine.schedule.races:
            story = f"{what or ('store' if write else 'load')} at {where()}"
            self.allocation.trace.access(self.pieces, write, machine.running.clock, agent, time, story)

    def fenced(self, what: str) -> None:
        """The asynchronous units see ordinary stores after a fence only."""
        if self.allocation.unfenced[self.pieces].any():
            raise ProtocolError(f"{what} at {where()}: no fence_async_shared since an ordinary store to {self}")

    def aligned(self, what: str) -> None:
        """A swizzle is a function of the address."""
        if self.base % alignment(self.layout):
            raise ProtocolError(f"{what} at {where()}: {self} does not begin at {alignment(self.layout)} bytes")

    def _window(self) -> Tensor:
        first = self.base // self.itemsize
        return self.allocation.elements(self.dtype)[first : first + self.table.extent]

    def read(self) -> Tensor:
        return self._window()[self.table.offset]

    def write(self, data: Tensor) -> None:
        inverse = self.table.inverse
        if inverse is None:
            self._window()[self.table.offset] = data
        else:
            torch.index_select(data.reshape(-1), 0, inverse, out=self._window())

    def poison(self) -> None:
        window = self._window()
        if self.table.inverse is None:
            window[self.table.offset] = math.nan
        else:
            window.fill_(math.nan)

    def barrier(self) -> Barrier:
        found = self.allocation.barriers.get(self.base)
        if found is None:
            raise ProtocolError(f"{where()}: the barrier at {self} is not initialised")
        return found


def _rank(layout: Any) -> int:
    if isinstance(layout, gl.NVMMASharedLayout):
        return int(layout.rank)
    return len(layout.order)


def _name() -> str:
    """The variable that gets the allocation, where its line says so, and the line."""
    frame: Any = sys._getframe(1)
    while frame is not None and "__gluon_interpreted__" not in frame.f_globals:
        frame = frame.f_back
    if frame is None:
        return "shared memory"
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    names = re.findall(r"(\w+)\s*=\s*[\w.]*alloc", line)
    at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    taken = sum(a.name.endswith(at) for a in current().allocations)
    return f"{names[taken] if taken < len(names) else 'shared memory'} {at}"
