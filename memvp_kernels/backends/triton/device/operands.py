"""Tiles of an operand: through a TMA descriptor where the host could make one, else through masked pointers of any strides.

The host decides (:mod:`..runtime.tma`) and passes a load mode at compile time; outside the operand every mode reads zeros. The tensor cores
read either orientation of a weight from shared memory, so no transposed copy is made.
"""

import triton
import triton.language as tl

__all__ = ["POINTER", "TMA", "TMA_PAIR", "TMA_TRANSPOSED", "load_memory_tile", "load_tile", "swizzle", "tile_pointers"]

POINTER = tl.constexpr(0)
TMA = tl.constexpr(1)  # a descriptor of the operand as named: its rows are contiguous
TMA_TRANSPOSED = tl.constexpr(2)  # a descriptor of its transpose: its columns are contiguous
TMA_PAIR = tl.constexpr(3)  # one descriptor (2, rows, columns) over two operands, see tma.make_pair_descriptor


@triton.jit
def load_tile(
    operand, row, column, rows, columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOAD: tl.constexpr, EVEN_ROWS: tl.constexpr = False, EVEN_COLUMNS: tl.constexpr = False,
):  # fmt: skip
    """Tile [ROWS, COLUMNS] at (row, column) of an operand (rows, columns).

    Args:
        LOAD: POINTER (then the strides, in elements, are used), TMA or TMA_TRANSPOSED.
        EVEN_ROWS, EVEN_COLUMNS: no tile crosses that edge, so pointers need no mask there.
    """
    if LOAD == TMA:
        tile = operand.load([row, column])
    elif LOAD == TMA_TRANSPOSED:
        tile = operand.load([column, row]).T
    else:
        o_row = row + tl.arange(0, ROWS)[:, None]
        o_column = column + tl.arange(0, COLUMNS)[None, :]
        pointers = operand + o_row.to(tl.int64) * stride_row + o_column.to(tl.int64) * stride_column
        if EVEN_ROWS and EVEN_COLUMNS:
            tile = tl.load(pointers)
        elif EVEN_ROWS:
            tile = tl.load(pointers, mask=o_column < columns, other=0.0)
        elif EVEN_COLUMNS:
            tile = tl.load(pointers, mask=o_row < rows, other=0.0)
        else:
            tile = tl.load(pointers, mask=(o_row < rows) & (o_column < columns), other=0.0)
    return tile


@triton.jit
def load_memory_tile(
    memory, memory_row, slot, column, slots, columns, strides, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    LOAD: tl.constexpr, EVEN_COLUMNS: tl.constexpr = False,
):  # fmt: skip
    """Tile [SLOTS, COLUMNS] at (slot, column) of one row of a memory (R, M, columns) with these three strides; LOAD is POINTER or TMA."""
    if LOAD == TMA:
        tile = memory.load([memory_row, slot, column]).reshape(SLOTS, COLUMNS)
    else:
        stride_memory, stride_slot, stride_column = strides
        base = memory + tl.cast(memory_row, tl.int64) * stride_memory
        tile = load_tile(
            base, slot, column, slots, columns, stride_slot, stride_column, SLOTS, COLUMNS, POINTER, False, EVEN_COLUMNS
        )  # fmt: skip
    return tile


@triton.jit
def tile_pointers(matrix, row, column, stride_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to tile [ROWS, COLUMNS] at (row, column) of a matrix whose rows are contiguous.

    64 bits to the corner, 32 within the tile: an epilogue's addresses lie beside the accumulator, where registers are scarce.
    """
    corner = matrix + tl.cast(row, tl.int64) * stride_row + column
    return corner + tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def swizzle(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a linear tile number, GROUP row tiles side by side so that they share columns in L2."""
    per_group = GROUP * column_tiles
    first = (tile // per_group) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = tile % per_group
    return first + inside % size, inside // size
