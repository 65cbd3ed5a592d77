"""Hopper's asynchronous units: mbarriers, TMA, wgmma and the fence between ordinary stores and the other two."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from tests.triton.gluon.layouts import offsets
from tests.triton.gluon.machine import Barrier, Load, ProtocolError, current, where
from tests.triton.gluon.shared import SharedView
from tests.triton.gluon.values import Block, gluon_dtype, number

__all__ = ["Accumulator", "Descriptor"]

_MAX_COUNT = 2**20 - 1  # arrivals, and bytes, of an mbarrier's phase


class Descriptor:
    """A tensor as TMA sees it; outside it there are zeros."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.base, self.layout = host.base, host.layout
        self.shape = tuple(int(n) for n in host.shape)
        self.strides = tuple(int(n) for n in host.strides)
        self.block_shape = [int(n) for n in host.block_shape]
        self.dtype = gluon_dtype(host.base.dtype)
        self.itemsize = host.base.element_size()
        self.nbytes_per_cta = math.prod(self.block_shape) * self.itemsize
        self.block_type = gl.block_type(self.dtype, self.block_shape)
        if self.base.data_ptr() % 16 or any(s * self.itemsize % 16 for s in self.strides[:-1]) or self.strides[-1] != 1:
            raise ProtocolError(f"TMA needs a base and strides of multiples of 16 bytes: {self.strides}")
        if any(not 0 < n <= 2**32 for n in self.shape) or any(s < 0 for s in self.strides):
            raise ProtocolError(f"TMA takes no tensor of shape {self.shape} and strides {self.strides}")
        if self.layout.transposed:
            raise ProtocolError("TMA knows no transposed layout")
        if getattr(host, "padding", "zero") != "zero":
            raise NotImplementedError("a descriptor that pads with NaN")
        # Whose dimensions lead out of the base's storage has no business here: torch refuses it.
        self._memory = self.base.detach().as_strided(self.shape, self.strides)
        self._view = self.shape, self.strides, self.base.storage_offset()

    def _box(self, coordinates: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a box that lies inside, in the tensor and in the box."""
        theirs, ours = [], []
        for start, box, size in zip(coordinates, self.block_shape, self.shape, strict=True):
            first, last = max(start, 0), max(min(start + box, size), max(start, 0))
            theirs.append(slice(min(first, size), min(last, size)))
            ours.append(slice(first - start, first - start + theirs[-1].stop - theirs[-1].start))
        return tuple(theirs), tuple(ours)

    def read(self, coordinates: Sequence[int], story: str) -> Tensor:
        theirs, ours = self._box(coordinates)
        current().touch(self.base, (self._view, theirs), False, story)
        out = torch.zeros(self.block_shape, dtype=self.base.dtype)
        out[ours] = self._memory[theirs]
        return out

    def write(self, coordinates: Sequence[int], values: Tensor, story: str) -> None:
        theirs, ours = self._box(coordinates)
        current().touch(self.base, (self._view, theirs), True, story)
        self._memory[theirs] = values[ours]

    def prepare(self, coordinates: Sequence[Any], view: SharedView, what: str) -> list[int]:
        """The coordinates as numbers, after TMA's and Triton's rules."""
        at = [operator.index(number(c)) for c in coordinates]
        if len(at) != len(self.shape):
            raise ProtocolError(f"{what} at {where()}: {len(at)} coordinates for {len(self.shape)} dimensions")
        if any(not -(2**31) <= c < 2**31 for c in at):
            raise ProtocolError(f"{what} at {where()}: coordinates {at} do not fit 32 bits")
        if at[-1] * self.itemsize % 16:
            raise ProtocolError(f"{what} at {where()}: column {at[-1]} is no multiple of 16 bytes")
        if view.shape != self.block_shape or view.dtype != self.dtype:
            raise ProtocolError(
                f"{what} at {where()}: a box {self.block_shape} of {self.dtype}, shared memory {view.shape} of {view.dtype}"
            )
        if view.layout != self.layout or not torch.equal(
            view.table.offset, offsets(self.layout, tuple(self.block_shape), self.itemsize * 8)
        ):
            raise ProtocolError(f"{what} at {where()}: the descriptor's layout {self.layout} is not {view.layout}")
        view.aligned(what)
        return at


# Barriers


def init(barrier: SharedView, count: Any) -> None:
    count = operator.index(count)
    if barrier.numel != 1 or barrier.dtype != gl.int64:
        raise ProtocolError(f"{where()}: a barrier is one int64, not {barrier.shape} of {barrier.dtype}")
    if not 1 <= count <= _MAX_COUNT:
        raise ProtocolError(f"{where()}: a barrier of {count} arrivals")
    if barrier.base in barrier.allocation.barriers:
        raise ProtocolError(f"{where()}: {barrier} is initialised already")
    machine = current()
    name = f"{barrier.allocation.name.split(' ')[0]}[{barrier.base // 8}]"
    made = Barrier(name, count, machine.agent(), machine.running)
    barrier.allocation.barriers[barrier.base] = made
    machine.barriers.append(made)


def invalidate(barrier: SharedView) -> None:
    machine = current()
    machine.step()
    found = barrier.barrier()
    if any(load.barrier is found for load in machine.loads):
        raise ProtocolError(f"{where()}: {found.name} is invalidated before its loads have landed")
    del barrier.allocation.barriers[barrier.base]
    machine.barriers.remove(found)


def expect(barrier: SharedView, bytes_per_cta: Any, pred: Any = True) -> None:
    """Bytes to come, and one arrival."""
    machine = current()
    machine.step()
    if not number(pred):
        return
    found, count = barrier.barrier(), operator.index(bytes_per_cta)
    if not 0 < count <= _MAX_COUNT:
        raise ProtocolError(f"{where()}: {count} bytes expected")
    found.bytes += count
    if found.bytes > _MAX_COUNT:
        raise ProtocolError(f"{where()}: more bytes than an mbarrier counts: {found}")
    _arrive(found, 1)


def arrive(barrier: SharedView, *, count: Any = 1, pred: Any = True) -> None:
    machine = current()
    machine.step()
    if number(pred):
        _arrive(barrier.barrier(), operator.index(count))


def _arrive(barrier: Barrier, count: int) -> None:
    me = current().running
    try:
        barrier.arrive(count, me.clock)
    except ProtocolError as error:
        raise ProtocolError(f"{where()}: {error}") from None
    me.tick()


def wait(barrier: SharedView, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not number(pred):
        return
    machine, found, parity = current(), barrier.barrier(), operator.index(number(phase))
    if parity not in (0, 1):
        raise ProtocolError(f"{where()}: phase {parity} is neither 0 nor 1")
    machine.wait(found, parity, where())
    machine.running.clock.join(found.released)


def fence_async_shared(cluster: bool = False) -> None:
    """Makes the running partition's ordinary stores, and the barriers it initialised, visible to TMA and wgmma."""
    machine = current()
    me = machine.running
    for allocation in machine.allocations:
        allocation.unfenced[allocation.unfenced == me.index + 1] = 0
    for barrier in machine.barriers:
        if barrier.unfenced == me.index:
            barrier.unfenced = None


# TMA


def async_load(
    tensor_desc: Descriptor,
    coord: Any,
    barrier: SharedView,
    result: SharedView,
    pred: Any = True,
    multicast: bool = False,
) -> None:
    if multicast:
        raise NotImplementedError("TMA multicast: there is one thread block")
    machine = current()
    machine.step()
    if not number(pred):
        return
    at = tensor_desc.prepare(coord, result, "TMA load")
    found = barrier.barrier()
    if found.unfenced is not None:
        raise ProtocolError(f"TMA load at {where()}: no fence_async_shared since {found.name} was initialised")
    result.fenced("TMA load")
    phase, known = found.phase, machine.running.clock.copy()
    result.access(True, found.agent, phase + 1, "TMA load")
    result.poison()

    story = f"TMA load at {where()}"

    def land() -> None:
        result.write(tensor_desc.read(at, story))
        found.land(tensor_desc.nbytes_per_cta, known, phase)

    machine.begin(Load(found, land, story))


class _Store:
    """A TMA store that has not read its tile yet."""

    def __init__(self, descriptor: Descriptor, at: Sequence[int], source: SharedView, time: int) -> None:
        self.descriptor, self.at, self.source, self.time = descriptor, at, source, time
        self.story = f"TMA store at {where()}"
        self.values: Tensor | None = None

    def read(self) -> None:
        if self.values is None:
            self.values = self.source.read()
            self.descriptor.write(self.at, self.values, self.story)


def async_store(tensor_desc: Descriptor, coord: Any, src: SharedView) -> None:
    """One group of its own."""
    machine = current()
    machine.step()
    me = machine.running
    at = tensor_desc.prepare(coord, src, "TMA store")
    src.fenced("TMA store")
    me.store_count += 1
    src.access(False, me.store_agent, me.store_count, "TMA store")
    store = _Store(tensor_desc, at, src, me.store_count)
    me.stores.append(store)
    if machine.schedule.reads == "early":
        store.read()


def store_wait(pendings: Any) -> None:
    """Until at most `pendings` of this partition's stores have not been read from shared memory."""
    machine = current()
    machine.step()
    me = machine.running
    while len(me.stores) > operator.index(pendings):
        done = me.stores.pop(0)
        done.read()
        me.clock[me.store_agent] = done.time


# Tensor cores


class _Registers:
    """Where a wgmma accumulates."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.writer, self.value = shape, "", torch.empty(0)


class _Result(Block):
    """An accumulator handed out by a wait, which may have left the last wgmma running."""

    def __init__(self, registers: _Registers, layout: Any) -> None:
        super().__init__(torch.empty(0), layout)
        self.registers = registers

    @property
    def data(self) -> Tensor:
        if self.registers.writer:
            raise ProtocolError(f"{where()} reads an accumulator before {self.registers.writer} was waited for")
        return self.registers.value

    def _shape(self) -> Sequence[int]:
        return self.registers.shape


class Accumulator:
    """What only a further wgmma or a wait may take."""

    def __init__(self, value: Block) -> None:
        self.value = value

    @property
    def shape(self) -> list[int]:
        return self.value.shape

    def __getattr__(self, name: str) -> Any:
        raise ProtocolError(f"{where()}: an accumulator has no {name} before warpgroup_mma_wait")


def warpgroup_mma_init(value: Block) -> Accumulator:
    if not isinstance(value, Block):
        raise TypeError(f"{where()}: warpgroup_mma_init of {value!r}")
    return Accumulator(value)


class _Product:
    """A wgmma that has not read its operands from shared memory yet."""

    def __init__(self, a: Any, b: SharedView, start: Block | None, out: _Registers, time: int) -> None:
        self.a, self.b, self.start, self.out, self.time = a, b, start, out, time
        self.story = out.writer = f"wgmma at {where()}"
        self.product: Tensor | None = None

    def read(self) -> None:
        if self.product is None:
            a = self.a.read() if isinstance(self.a, SharedView) else self.a.data
            self.product = torch.mm(a.float(), self.b.read().float())

    def finish(self) -> None:
        self.read()
        product = self.product
        assert product is not None
        self.out.value = product if self.start is None else product.add_(self.start.data)
        self.out.writer = ""


def warpgroup_mma(
    a: Any, b: SharedView, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None, is_async: bool = False
) -> Any:  # fmt: skip
    machine = current()
    machine.step()
    me = machine.running
    start: Block = acc.value if isinstance(acc, Accumulator) else acc
    _check_mma(a, b, start, me.warps)
    me.mma_count += 1
    for operand in (a, b):
        if isinstance(operand, SharedView):
            operand.aligned("wgmma")
            operand.fenced("wgmma")
            operand.access(False, me.mma_agent, me.mma_count, "wgmma")
    out = _Registers(tuple(start.shape))
    product = _Product(a, b, start if number(use_acc) else None, out, me.mma_count)
    me.mmas.append(product)
    if machine.schedule.reads == "early":
        product.read()
    result = _Result(out, start.layout)
    if is_async:
        return Accumulator(result)
    _retire(0)
    return result


def _retire(outstanding: int) -> None:
    me = current().running
    while len(me.mmas) > outstanding:
        done = me.mmas.pop(0)
        done.finish()
        me.clock[me.mma_agent] = done.time


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    current().step()
    _retire(operator.index(num_outstanding))
    results = [d.value if isinstance(d, Accumulator) else d for d in deps]
    return results[0] if len(results) == 1 else tuple(results)


def _check_mma(a: Any, b: SharedView, acc: Block, warps: int) -> None:
    """What wgmma takes: m64 a warpgroup, n a multiple of 8 up to 256, k 16, 16-bit operands, B in shared memory."""
    at = where()
    if not isinstance(b, SharedView):
        raise ProtocolError(f"{at}: wgmma takes B from shared memory only")
    (rows, depth), (depth_b, columns) = a.shape, b.shape
    if depth != depth_b or acc.shape != [rows, columns]:
        raise ProtocolError(f"{at}: {a.shape} times {b.shape} into {acc.shape}")
    if a.dtype != b.dtype or a.dtype not in (gl.float16, gl.bfloat16):
        raise ProtocolError(f"{at}: wgmma of {a.dtype} and {b.dtype}")
    for operand in (a, b):
        if isinstance(operand, SharedView) and not isinstance(operand.layout, gl.NVMMASharedLayout):
            raise ProtocolError(f"{at}: wgmma takes no operand in {operand.layout}")
    layout = acc.layout
    if not isinstance(layout, gl.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise ProtocolError(f"{at}: wgmma accumulates in NVMMADistributedLayout([3, 0], …), not in {layout}")
    m, n, k = layout.instr_shape
    if m != 16 or k != 16 or n % 8 or not 8 <= n <= 256 or columns % n:
        raise ProtocolError(
            f"{at}: an instruction of shape {layout.instr_shape} for {columns} columns of 16-bit operands"
        )
    groups = math.prod(layout.warps_per_cta)
    if groups % 4 or layout.warps_per_cta[0] % 4 or groups != warps:
        raise ProtocolError(f"{at}: {layout.warps_per_cta} warps of an accumulator in a partition of {warps}")
    if rows % 64 or depth % 16:
        raise ProtocolError(f"{at}: {rows} rows, depth {depth}: wgmma takes multiples of 64 and 16")
