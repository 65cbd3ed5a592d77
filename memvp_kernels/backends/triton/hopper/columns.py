"""The shared columns beside an FFN's: left · memoryᵀ for a memory that all rows read, stored as it is, by the tiles after the FFN's."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.hopper.epilogue import PIECE, pieces_of, store_piece
from memvp_kernels.backends.triton.hopper.ring import finish_product, load_product, multiply, start_product
from memvp_kernels.backends.triton.hopper.walk import corner, first_from

__all__ = ["load_columns", "multiply_columns"]


@gluon.jit
def load_columns(
    ring, step, left, memory, before, row_tiles, M: gl.constexpr, d: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Producer, after `before` other tiles of the launch: left (N, d) and memory (M, d)."""
    tiles_left, tiles_right, _, _ = ring
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    WIDE: gl.constexpr = tiles_right.shape[1]
    column_tiles: gl.constexpr = (M + WIDE - 1) // WIDE
    for tile in range(first_from(before), before + row_tiles * column_tiles, gl.num_programs(0)):
        row, column = corner(tile - before, row_tiles, M, BLOCK_N, WIDE, GROUP)
        step = load_product(ring, step, left, memory, None, row, column, d, True)


@gluon.jit
def multiply_columns(
    ring, step, buffers, sent, columns, before, row_tiles, M: gl.constexpr, d: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Consumers: columns (N, M)."""
    tiles_left, tiles_right, _, _ = ring
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    WIDE: gl.constexpr = tiles_right.shape[1]
    column_tiles: gl.constexpr = (M + WIDE - 1) // WIDE
    for tile in range(first_from(before), before + row_tiles * column_tiles, gl.num_programs(0)):
        row, column = corner(tile - before, row_tiles, M, BLOCK_N, WIDE, GROUP)
        acc = start_product(ring)
        previous = -1
        acc, step, previous = multiply(acc, ring, step, previous, d, True)
        pieces = pieces_of(finish_product(acc, ring, previous))
        for i in gl.static_range(len(pieces)):
            sent = store_piece(pieces[i], buffers, sent, columns, row, column + i * PIECE)
