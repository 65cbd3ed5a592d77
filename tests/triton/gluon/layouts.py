"""Where an element of a shared-memory tile lies: Triton's layouts as tables of offsets.

What Triton says (`nvmmaSharedToLinearLayout` in its lib/Dialect/TritonGPU/IR/LinearLayoutConversions.cpp, checked against the installed
library by tests/triton/test_gluon_layouts.py): the outer dimensions of a tile [..., rows, columns] collapse into one; the columns
split into panels as wide as the swizzle (64 columns of 16 bits in 128 bytes), one whole panel [rows, width] after the other; within a
panel the 16-byte pieces of a row are permuted by exclusive or with the row modulo 8 (128 bytes; row / 2 modulo 4 for 64, row / 4
modulo 2 for 32), which is what TMA does to the address bits, so that a panel must begin at a multiple of 8 swizzles.
A transposed layout has the two dimensions in each other's role. Without a swizzle a tile is row-major, up to TMA's 256 a dimension.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

__all__ = ["alignment", "offsets"]

_PIECE_BYTES = 16
_ROWS = 8
_BOX = 256


def alignment(layout: Any) -> int:
    """Bytes to which a tile of that layout must be aligned, or its swizzle is another."""
    if isinstance(layout, gl.NVMMASharedLayout) and layout.swizzle_byte_width:
        return int(layout.swizzle_byte_width) * _ROWS
    return _PIECE_BYTES


def offsets(layout: Any, shape: tuple[int, ...], bits: int) -> Tensor:
    """For every index of a tile of `shape` its offset in elements of `bits` bits: int64, of that shape."""
    if isinstance(layout, gl.NVMMASharedLayout):
        return _nvmma(layout.swizzle_byte_width, layout.element_bitwidth, bool(layout.transposed), shape, bits)
    if isinstance(layout, gl.SwizzledSharedLayout):
        if layout.max_phase != 1:
            raise NotImplementedError(f"{layout}: only its unswizzled form is modelled")
        return _strided(tuple(layout.order), shape)
    raise NotImplementedError(f"shared layout {type(layout).__name__}")


@functools.cache
def _strided(order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Dense, order[0] the fastest dimension."""
    out, stride = torch.zeros(shape, dtype=torch.int64), 1
    for dimension in order:
        steps = torch.arange(shape[dimension]) * stride
        out = out + steps.view([-1 if d == dimension else 1 for d in range(len(shape))])
        stride *= shape[dimension]
    return out


@functools.cache
def _nvmma(swizzle: int, layout_bits: int, transposed: bool, shape: tuple[int, ...], bits: int) -> Tensor:
    if layout_bits != bits:
        raise ValueError(f"a layout of {layout_bits}-bit elements on elements of {bits} bits")
    if transposed:
        if len(shape) != 2 or shape[1] > _BOX:
            raise NotImplementedError(
                f"a transposed tile {list(shape)}: Triton's own order is another in more than one box"
            )
        return _nvmma(swizzle, bits, False, (shape[1], shape[0]), bits).T.contiguous()
    columns, rows = shape[-1], math.prod(shape[:-1])
    if swizzle == 0:
        if max(shape) > _BOX:
            raise NotImplementedError(f"{list(shape)} without a swizzle is more than one box of {_BOX} a dimension")
        return torch.arange(rows * columns).view(shape)
    width = swizzle * 8 // bits
    if columns < width or rows < _ROWS:
        raise ValueError(f"a tile {list(shape)} is smaller than one swizzle pattern, [{_ROWS}, {width}]")
    if columns % width:
        raise ValueError(f"{columns} columns are no whole number of panels of {width}")
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    per_piece = _PIECE_BYTES * 8 // bits
    phases = swizzle // _PIECE_BYTES
    phase = row // (_ROWS // phases) % phases
    inside = column % width
    swizzled = (inside // per_piece ^ phase) * per_piece + inside % per_piece
    return (column // width * rows * width + row * width + swizzled).reshape(shape)
