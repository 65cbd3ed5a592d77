"""What the functions of gluon.language, and of triton.language where a Gluon kernel shares code with Triton's, do when interpreted."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as nvidia
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tests.triton.gluon import hopper, shared
from tests.triton.gluon.machine import ProtocolError, current, where
from tests.triton.gluon.pointers import Pointer
from tests.triton.gluon.values import (
    Block,
    Scalar,
    as_tensor,
    dtype_of,
    elementwise,
    number,
    promoted,
    torch_dtype,
)

__all__ = ["REPLACED", "kernel_range"]


def kernel_range(*bounds: Any, **_: Any) -> Any:
    """range(), whose variable is a run-time value in a kernel."""
    return (Scalar(i, torch.int32) for i in range(*(operator.index(b) for b in bounds)))


def _static_range(*bounds: Any, **_: Any) -> Any:
    for bound in bounds:
        if isinstance(bound, Scalar):
            raise TypeError(f"{where()}: static_range of a run-time value")
    return range(*bounds)


def _pass(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _nothing(*_: Any, **__: Any) -> None:
    return None


# Programs


def _program_id(axis: Any) -> Scalar:
    return Scalar((*current().program, 0, 0)[axis], torch.int32)


def _num_programs(axis: Any) -> Scalar:
    return Scalar((*current().grid, 1, 1)[axis], torch.int32)


def _num_warps() -> int:
    return current().running.warps


def _assert(condition: Any, message: Any = "", *_: Any, **__: Any) -> None:
    if not bool(as_tensor(condition).all()):
        raise AssertionError(f"{where()}: {message}")


def _warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any = None) -> Any:
    if worker_num_regs is not None:
        if len(worker_num_regs) != len(worker_num_warps):
            raise ProtocolError(
                f"{where()}: {len(worker_num_regs)} register counts for {len(worker_num_warps)} workers"
            )
        if any(r % 8 or not 24 <= r <= 256 for r in worker_num_regs):
            raise ProtocolError(f"{where()}: setmaxnreg takes multiples of 8 from 24 to 256, not {worker_num_regs}")
    if any(n & (n - 1) for n in worker_num_warps):
        raise ProtocolError(f"{where()}: partitions of {worker_num_warps} warps; Triton takes powers of two")
    return current().specialise(functions_and_args, worker_num_warps)


def _allocate_mbarrier(batch: Any = None, two_ctas: bool = False) -> Any:
    return shared.allocate(gl.int64, [1] if batch is None else [batch, 1], mbarrier.MBarrierLayout())


# Blocks


def _arange(start: int, end: int, layout: Any = None) -> Block:
    if (end - start) & (end - start - 1) or end <= start:
        raise ValueError(f"{where()}: arange({start}, {end}) is no power of two")
    return Block(torch.arange(start, end, dtype=torch.int32), layout)


def _full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
    sizes = tuple(operator.index(n) for n in shape)
    data = torch.full(sizes, number(value), dtype=torch_dtype(dtype))
    return Block(data, layout) if sizes else Scalar(data.item(), data.dtype)


def _convert_layout(value: Block, layout: Any, assert_trivial: bool = False) -> Block:
    return Block(value.data, layout)


def _where(condition: Any, x: Any, y: Any) -> Any:
    if not any(isinstance(v, Block) for v in (condition, x, y)):
        return _scalar(x if number(condition) else y, promoted(x, y))
    dtype = promoted(x, y)
    return elementwise(lambda c, a, b: torch.where(c.to(torch.bool), a.to(dtype), b.to(dtype)), condition, x, y)


def _scalar(value: Any, dtype: torch.dtype) -> Scalar:
    return Scalar(torch.tensor(number(value), dtype=dtype).item(), dtype)


def _extremum(choose: Callable[..., Any], floats: Callable[..., Tensor], ints: Callable[..., Tensor]) -> Any:
    def function(x: Any, y: Any, propagate_nan: Any = None, **_: Any) -> Any:
        dtype = promoted(x, y)
        if not isinstance(x, Block) and not isinstance(y, Block):
            return _scalar(choose(number(x), number(y)), dtype)
        return elementwise(floats if dtype.is_floating_point else ints, x, y, dtype=dtype)

    return function


def _unary(function: Callable[[Tensor], Tensor]) -> Any:
    def apply(x: Any, **_: Any) -> Any:
        if not as_tensor(x).is_floating_point():
            raise TypeError(f"{where()}: {function.__name__} of {dtype_of(x)}")
        return elementwise(function, x)

    return apply


def _to(x: Any, dtype: Any, bitcast: bool = False, **_: Any) -> Any:
    return (x if isinstance(x, (Scalar, Block)) else Scalar(x, dtype_of(x))).to(dtype, bitcast=bitcast)


def _reduction(function: Callable[..., Tensor]) -> Any:
    def reduce(x: Block, axis: Any = None, keep_dims: bool = False, **_: Any) -> Any:
        data = x.data.float() if x.data.dtype in (torch.float16, torch.bfloat16) else x.data
        dims = tuple(range(x.rank)) if axis is None else (axis,)
        out = function(data, dims, keep_dims).to(x.data.dtype)
        layout = gl.SliceLayout(axis % x.rank, x.layout) if axis is not None and x.layout is not None else None
        return Block(out, x.layout if keep_dims else layout) if out.dim() else Scalar(out.item(), out.dtype)

    return reduce


def _join(a: Block, b: Block) -> Block:
    return Block(torch.stack([a.data, b.data], -1))


def _load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    current().step()
    return pointer.load(mask, other)


def _store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    current().step()
    pointer.store(value, mask)


def _atomic_add(pointer: Pointer, val: Any, mask: Any = None, **_: Any) -> Any:
    current().step()
    return pointer.add(val, mask)


def _fma(x: Any, y: Any, z: Any, **_: Any) -> Any:
    return elementwise(lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype), x, y, z)


_LANGUAGE: dict[str, Any] = {
    "static_range": _static_range, "range": kernel_range, "program_id": _program_id, "num_programs": _num_programs, "num_warps": _num_warps,
    "num_ctas": lambda: 1, "static_assert": _assert, "device_assert": _assert, "static_print": _nothing,
    "device_print": _nothing, "assume": _nothing, "barrier": _nothing, "debug_barrier": _nothing,
    "multiple_of": _pass, "max_contiguous": _pass, "max_constancy": _pass, "to_tensor": _pass,
    "warp_specialize": _warp_specialize, "allocate_shared_memory": shared.allocate,
    "arange": _arange, "full": _full, "convert_layout": _convert_layout, "set_auto_layout": _convert_layout, "where": _where,
    "minimum": _extremum(builtins.min, torch.fmin, torch.minimum), "maximum": _extremum(builtins.max, torch.fmax, torch.maximum),
    "cast": _to, "load": _load, "store": _store, "atomic_add": _atomic_add, "fma": _fma, "join": _join,
    "split": lambda x: x.split(), "reshape": lambda x, *s, **_: x.reshape(*s), "permute": lambda x, *d: x.permute(*d),
    "trans": lambda x, *d: x.permute(*(d or (1, 0))), "expand_dims": lambda x, axis: x.expand_dims(axis),
    "broadcast": lambda x, y: (elementwise(lambda a, b: a.expand(b.shape).clone(), x, y)),
    "broadcast_to": lambda x, *s: x.broadcast_to(*s),
    "sum": _reduction(torch.sum), "max": _reduction(torch.amax), "min": _reduction(torch.amin),
    "exp": _unary(torch.exp), "exp2": _unary(torch.exp2), "log": _unary(torch.log), "log2": _unary(torch.log2),
    "sqrt": _unary(torch.sqrt), "sqrt_rn": _unary(torch.sqrt), "rsqrt": _unary(torch.rsqrt), "erf": _unary(torch.erf),
    "sin": _unary(torch.sin), "cos": _unary(torch.cos), "floor": _unary(torch.floor), "ceil": _unary(torch.ceil),
    "abs": lambda x: elementwise(torch.abs, x), "fdiv": lambda x, y, **_: x / y, "div_rn": lambda x, y: x / y,
}  # fmt: skip

_HOPPER: dict[str, Any] = {
    "fence_async_shared": hopper.fence_async_shared, "warpgroup_mma": hopper.warpgroup_mma,
    "warpgroup_mma_wait": hopper.warpgroup_mma_wait, "warpgroup_mma_init": hopper.warpgroup_mma_init,
}  # fmt: skip
_TMA: dict[str, Any] = {
    "async_copy_global_to_shared": hopper.async_load, "async_copy_shared_to_global": hopper.async_store,
    "async_load": hopper.async_load, "async_store": hopper.async_store, "store_wait": hopper.store_wait,
}  # fmt: skip
_MBARRIER: dict[str, Any] = {
    "init": hopper.init, "expect": hopper.expect, "arrive": hopper.arrive, "wait": hopper.wait,
    "invalidate": hopper.invalidate, "allocate_mbarrier": _allocate_mbarrier,
}  # fmt: skip


def _replacements() -> dict[int, tuple[Any, Any]]:
    """By identity, however a kernel's module imported them: id of Triton's object: (that object, ours)."""
    out = {}
    for theirs, ours in ((gl, _LANGUAGE), (tl, _LANGUAGE), (nvidia, _HOPPER), (tma, _TMA), (mbarrier, _MBARRIER)):
        for name, function in ours.items():
            if hasattr(theirs, name):
                out[id(getattr(theirs, name))] = getattr(theirs, name), function
    return out


REPLACED = _replacements()
