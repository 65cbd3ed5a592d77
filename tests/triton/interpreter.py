"""What the tests need of Triton's interpreter beyond what it does: bfloat16 arithmetic, speed, and launches too large to run whole.

It holds a bfloat16 block as uint16, computes on those raw 16 bits, and truncates where it should round. Here every operation on such
blocks widens them to float32, runs the interpreter's own operation, and rounds the result to nearest even, as the GPU does. float32,
float16 and integers pass through untouched. Tests only; without it a bfloat16 test would judge the interpreter, not the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

__all__ = ["only_programs", "repair"]

# Builder methods whose first n operands may be bfloat16 and whose result then is, unless it is a comparison's.
_ELEMENTWISE = {
    "binary_op": 2,
    "unary_op": 1,
    "create_fma": 3,
    "create_erf": 1,
    "create_rsqrt": 1,
    "create_clampf": 3,
}


def repair() -> None:
    """Patch the interpreter, once per process."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    for name, operands in _ELEMENTWISE.items():
        setattr(InterpreterBuilder, name, _elementwise(getattr(InterpreterBuilder, name), operands))
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _float_to_float(
        InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.cast_impl
    )
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _over_axis(operation.apply_impl)
    InterpretedFunction.__call__ = _call_device_function
    _check_overflow(False)


_known: set[Callable[..., Any]] = set()


def _call_device_function(self: Any, *arguments: Any, **options: Any) -> Any:
    """Triton patches its language anew in every call, a third of the time; a launch has done it, and once does for its own library."""
    if self.fn not in _known:
        _known.add(self.fn)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **options)


def _check_overflow(wanted: bool) -> None:
    """Of 32-bit integers, another third of the time: for launches large enough."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).astype(np.uint16)


def _narrow(handle: Any) -> Any:
    return handle if handle.data.dtype == np.bool_ else TensorHandle(_round(handle.data), tl.bfloat16)


def _elementwise(known: Callable[..., Any], operands: int) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any) -> Any:
        if not any(_is_bfloat16(a) for a in arguments[:operands]):
            return known(self, *arguments)
        wide = [_widen(a) for a in arguments[:operands]]
        return _narrow(known(self, *wide, *arguments[operands:]))

    return method


def _dot(known: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return known(self, _widen(a), _widen(b), accumulator, *options)

    return create_dot


def _cast(known: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return TensorHandle(_round(source.data.astype(np.float32)), target.scalar)
        if not _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return known(self, source, target)
        return _widen(source) if target.scalar == tl.float32 else known(self, _widen(source), target)

    return cast_impl


def _float_to_float(known: Callable[..., Any], cast: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if _is_bfloat16(source) or (target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32):
            return cast(self, source, target)
        return known(self, source, target, rounding)

    return create_fp_to_fp


def _over_axis(known: Callable[..., Any]) -> Callable[..., Any]:
    def like(tensor: Any, handle: Any) -> Any:
        block = tensor.type.is_block()
        return tl.core.tensor(handle, tl.block_type(handle.dtype, tensor.type.shape) if block else handle.dtype)

    def apply_impl(self: Any, inputs: Any) -> Any:
        narrow = [_is_bfloat16(tensor.handle) for tensor in inputs]
        if not any(narrow):
            return known(self, inputs)
        results = known(self, tuple(like(t, _widen(t.handle)) for t in inputs))
        several = isinstance(results, (list, tuple))
        rounded = [
            like(r, _narrow(r.handle)) if was and r.dtype.scalar == tl.float32 else r
            for r, was in zip(results if several else [results], narrow, strict=True)
        ]
        return rounded if several else rounded[0]

    return apply_impl


@contextlib.contextmanager
def only_programs(*chosen: int) -> Iterator[None]:
    """Within it a launch runs these programs of its grid alone, and reads or writes nothing outside its arguments' storages.

    For launches too large to interpret. Arguments are used where they lie, not copied to and fro.
    """
    launch = GridExecutor.__call__
    builder = interpreter.interpreter_builder
    allowed: list[tuple[int, int]] = []

    def run(self: Any, *arguments: Any, **options: Any) -> None:
        allowed[:] = [_extent(a) for a in (*arguments, *options.values()) if hasattr(getattr(a, "base", a), "data_ptr")]
        grid, self.grid = self.grid, (len(chosen),)
        index, dimensions = type(builder).set_grid_idx, type(builder).set_grid_dim
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(builder), "set_grid_dim", lambda b, *_: dimensions(b, *grid, *(1,) * (3 - len(grid))))
            patch.setattr(type(builder), "set_grid_idx", lambda b, x, y, z: index(b, chosen[x], y, z))
            launch(self, *arguments, **options)

    def checked(access: Callable[..., Any], mask: int) -> Callable[..., Any]:
        def method(self: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
            used = pointers.data[rest[mask].data]
            inside = np.zeros(used.shape, dtype=bool)
            for start, end in allowed:
                inside |= (used >= start) & (used < end)
            if not inside.all():
                raise IndexError(f"address {int(used[~inside][0]):#x} is in none of the arguments")
            return access(self, pointers, *rest, **options)

        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", run)
        patch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked(InterpreterBuilder.create_masked_load, 0))
        patch.setattr(InterpreterBuilder, "create_masked_store", checked(InterpreterBuilder.create_masked_store, 1))
        _check_overflow(True)
        try:
            yield
        finally:
            _check_overflow(False)


def _extent(argument: Any) -> tuple[int, int]:
    """Where the storage of a tensor, or of a descriptor's tensor, begins and ends."""
    storage = getattr(argument, "base", argument).untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
