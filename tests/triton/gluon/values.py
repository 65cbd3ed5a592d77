"""Values of an interpreted kernel: run-time scalars and blocks in registers. Types and their promotion are Triton's.

A compile-time constant is a plain Python value. Python arithmetic on it is what the compiler does, too.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

__all__ = [
    "Block", "Scalar", "as_tensor", "common_layout", "dtype_of", "elementwise", "gluon_dtype", "number", "promoted",
    "torch_dtype", "wrap",
]  # fmt: skip

_TORCH = {
    gl.int1: torch.bool, gl.int8: torch.int8, gl.int16: torch.int16, gl.int32: torch.int32, gl.int64: torch.int64,
    gl.uint8: torch.uint8, gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32,
    gl.float64: torch.float64,
}  # fmt: skip
_GLUON = {theirs: ours for ours, theirs in _TORCH.items()}
_NUMBERS: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.bool: bool, torch.float16: float, torch.bfloat16: float, torch.float64: float,
    torch.float32: lambda value: float(np.float32(value)),
}  # fmt: skip
_HALVES = (torch.float16, torch.bfloat16)
_COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)


def torch_dtype(dtype: Any) -> torch.dtype:
    """torch's name of a Triton element type."""
    return _TORCH[dtype]


def gluon_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a torch dtype."""
    return _GLUON[dtype]


def dtype_of(value: Any) -> torch.dtype:
    """The element type of a value; of a Python number, the one that it would get."""
    if isinstance(value, Scalar):
        return value.element
    if isinstance(value, Block):
        return value.data.dtype
    if isinstance(value, (bool, np.bool_)):
        return torch.bool
    if isinstance(value, numbers.Integral):
        return torch.int32 if -(2**31) <= int(value) < 2**31 else torch.int64
    return torch.float32


def number(value: Any) -> Any:
    """A Python number of a scalar."""
    return value.value if isinstance(value, Scalar) else value


def _kind(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else 2 if dtype.is_floating_point else 1


def promoted(a: Any, b: Any, division: bool = False) -> torch.dtype:
    """The type in which Triton computes `a op b`."""
    return _common(dtype_of(a), not isinstance(a, _Operators), dtype_of(b), not isinstance(b, _Operators), division)


@functools.cache
def _common(a: torch.dtype, a_number: bool, b: torch.dtype, b_number: bool, division: bool) -> torch.dtype:
    """TritonSemantic.computation_type_impl: a Python number never widens a value of its own kind or of a higher one."""
    if a_number != b_number:
        one, other = (a, b) if a_number else (b, a)
        if _kind(one) <= _kind(other):
            return torch.float32 if division and other in _HALVES else other
    for wide in (torch.float64, torch.float32):
        if wide in (a, b):
            return wide
    if torch.float16 in (a, b):
        return torch.float32 if division else torch.float16
    if torch.bfloat16 in (a, b):
        return torch.bfloat16 if a == b and not division else torch.float32
    return max(a, b, key=lambda dtype: (dtype != torch.bool, dtype.itemsize))


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The torch tensor of a value, of no dimension for a scalar."""
    if isinstance(value, Block):
        return value.data if dtype is None else value.data.to(dtype)
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.tensor(number(value), dtype=dtype or dtype_of(value))


def wrap(result: Tensor, layout: Any) -> Any:
    """A block, or a scalar of no dimension."""
    if result.dim():
        return Block(result, layout)
    return Scalar(result.item(), result.dtype)


def common_layout(values: Sequence[Any]) -> Any:
    """The layout of values that meet in one operation, which must not differ; None where none is known."""
    blocks = [v for v in values if getattr(v, "rank", 0)]
    ranks = {b.rank for b in blocks}
    if len(ranks) > 1:
        raise ValueError(f"Gluon broadcasts no rank: {[tuple(b.shape) for b in blocks]}")
    known = [b.layout for b in blocks if b.layout is not None]
    if any(layout != known[0] for layout in known[1:]):
        raise ValueError(f"layouts differ, convert_layout first: {known}")
    return known[0] if known else None


def elementwise(function: Callable[..., Tensor], *values: Any, dtype: torch.dtype | None = None) -> Any:
    """`function` on the values broadcast, converted to one dtype unless that is None."""
    layout = common_layout(values)
    return wrap(function(*(as_tensor(v, dtype) for v in values)), layout)


def _trunc_divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


_DIVISIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    operator.truediv: torch.true_divide, operator.floordiv: _trunc_divide, operator.mod: torch.fmod,
}  # fmt: skip


def _scalars(op: Any, a: Any, b: Any, dtype: torch.dtype) -> Any:
    """Two scalars in plain Python: a kernel's index arithmetic is most of what it does. C's division; no wrapping goes unseen."""
    x, y = number(a), number(b)
    if op in _COMPARISONS:
        return Scalar(op(x, y), torch.bool)
    if op in (operator.floordiv, operator.mod):
        quotient = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        result = quotient if op is operator.floordiv else x - quotient * y
    else:
        result = op(x, y)
    limit = 2 ** (8 * dtype.itemsize - 1)
    if dtype in (torch.int32, torch.int64) and not -limit <= result < limit:
        raise OverflowError(f"{x} {op.__name__} {y} does not fit {dtype}")
    return Scalar(result, dtype)


def _binary(op: Any, a: Any, b: Any) -> Any:
    if not isinstance(a, _COMPUTED) or not isinstance(b, _COMPUTED):
        return NotImplemented
    dtype = promoted(a, b, op in (operator.truediv, operator.mod))
    if op is operator.truediv and not dtype.is_floating_point:
        dtype = torch.float32
    if not isinstance(a, Block) and not isinstance(b, Block) and not dtype.is_floating_point:
        return _scalars(op, a, b, dtype)
    return elementwise(_DIVISIONS.get(op, op), a, b, dtype=dtype)


class _Operators:
    """Python's operators, for scalars and blocks alike."""

    def __add__(self, other: Any) -> Any:
        return _binary(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary(operator.truediv, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _binary(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _binary(operator.floordiv, other, self)

    def __mod__(self, other: Any) -> Any:
        return _binary(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return _binary(operator.mod, other, self)

    def __and__(self, other: Any) -> Any:
        return _binary(operator.and_, self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return _binary(operator.or_, self, other)

    __ror__ = __or__

    def __xor__(self, other: Any) -> Any:
        return _binary(operator.xor, self, other)

    __rxor__ = __xor__

    def __lshift__(self, other: Any) -> Any:
        return _binary(operator.lshift, self, other)

    def __rlshift__(self, other: Any) -> Any:
        return _binary(operator.lshift, other, self)

    def __rshift__(self, other: Any) -> Any:
        return _binary(operator.rshift, self, other)

    def __rrshift__(self, other: Any) -> Any:
        return _binary(operator.rshift, other, self)

    def __lt__(self, other: Any) -> Any:
        return _binary(operator.lt, self, other)

    def __le__(self, other: Any) -> Any:
        return _binary(operator.le, self, other)

    def __gt__(self, other: Any) -> Any:
        return _binary(operator.gt, self, other)

    def __ge__(self, other: Any) -> Any:
        return _binary(operator.ge, self, other)

    def __eq__(self, other: Any) -> Any:
        return _binary(operator.eq, self, other)

    def __ne__(self, other: Any) -> Any:
        return _binary(operator.ne, self, other)

    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Any:
        return _binary(operator.sub, 0, self)

    def __invert__(self) -> Any:
        return elementwise(torch.bitwise_not, self)


class Scalar(_Operators):
    """A number known at run time only."""

    rank = 0
    shape: tuple[int, ...] = ()
    layout = None

    def __init__(self, value: Any, element: torch.dtype) -> None:
        self.value, self.element = _NUMBERS.get(element, int)(value), element

    @property
    def dtype(self) -> Any:
        return _GLUON[self.element]

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return f"{self.value}:{self.dtype}"

    def to(self, dtype: Any, **_: Any) -> Scalar:
        return wrap(as_tensor(self).to(torch_dtype(dtype)), None)


class Block(_Operators):
    """A tensor in registers. Its data can't be had while a wgmma still writes it."""

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self._data, self.layout = data, layout

    @property
    def data(self) -> Tensor:
        return self._data

    @property
    def dtype(self) -> Any:
        return _GLUON[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self._shape())

    def _shape(self) -> Sequence[int]:
        return self._data.shape

    @property
    def rank(self) -> int:
        return len(self._shape())

    @property
    def numel(self) -> int:
        return math.prod(self._shape())

    @property
    def type(self) -> Any:
        return gl.distributed_type(self.dtype, self.shape, self.layout or gl.AutoLayout())

    @property
    def T(self) -> Block:
        return self.permute(1, 0)

    def __bool__(self) -> bool:
        raise TypeError("a block has no truth value")

    def __repr__(self) -> str:
        return f"Block({self.shape}, {self.dtype})"

    def __getitem__(self, index: Any) -> Block:
        return Block(self.data[_expansion(index, self.rank)], _parent(self.layout, index))

    def to(self, dtype: Any, bitcast: bool = False, **_: Any) -> Block:
        wanted = torch_dtype(dtype)
        return Block(self.data.view(wanted) if bitcast else self.data.to(wanted), self.layout)

    def cast(self, dtype: Any, bitcast: bool = False) -> Block:
        return self.to(dtype, bitcast)

    def reshape(self, *shape: Any) -> Block:
        return Block(self.data.reshape(_sizes(shape)))

    def permute(self, *dimensions: Any) -> Block:
        return Block(self.data.permute(_sizes(dimensions)))

    trans = permute

    def split(self) -> tuple[Block, Block]:
        if self.shape[-1] != 2:
            raise ValueError(f"split of {self.shape}: the last dimension must be 2")
        return Block(self.data[..., 0]), Block(self.data[..., 1])

    def expand_dims(self, axis: int) -> Block:
        return self[tuple(None if d == axis else slice(None) for d in range(self.rank + 1))]

    def broadcast_to(self, *shape: Any) -> Block:
        return Block(self.data.expand(_sizes(shape)), self.layout)


def _sizes(values: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes given one by one or as one sequence."""
    if len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = tuple(values[0])
    return tuple(operator.index(v) for v in values)


def _expansion(index: Any, rank: int) -> tuple[Any, ...]:
    index = index if isinstance(index, tuple) else (index,)
    if any(i is not None and i != slice(None) for i in index) or sum(i is not None for i in index) != rank:
        raise TypeError(f"a block is indexed by None and : alone, not by {index}")
    return index


def _parent(layout: Any, index: Any) -> Any:
    """The layout of x[:, None]: the one that x's is a slice of, which must lack that dimension."""
    index = index if isinstance(index, tuple) else (index,)
    for position, what in enumerate(index):
        if what is None and layout is not None:
            if not isinstance(layout, gl.SliceLayout) or layout.dim != position:
                raise ValueError(f"[..., None, ...] at {position} needs a SliceLayout({position}, …), not {layout}")
            layout = layout.parent
    return layout


_COMPUTED = (Scalar, Block, int, float, np.number, np.bool_)
