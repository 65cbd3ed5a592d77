"""Which tiles a program owns: every num_programs-th of a launch's, the producer's warp and the consumers' counting alike."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.operands import swizzle

__all__ = ["corner", "first_from"]


@gluon.jit
def first_from(start):
    """The first of this program's tiles that is not before tile `start`."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return program + gl.cdiv(gl.maximum(start - program, 0), programs) * programs


@gluon.jit
def corner(tile, row_tiles, COLUMNS: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr, GROUP: gl.constexpr):
    """(first row, first column) of a tile of a product with so many columns."""
    row_tile, column_tile = swizzle(tile, row_tiles, (COLUMNS + WIDE - 1) // WIDE, GROUP)
    return row_tile * BLOCK_N, column_tile * WIDE
