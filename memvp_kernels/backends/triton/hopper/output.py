"""The output kernel and dx's in Gluon: one or two products with weights and one with a memory, in one accumulator; then bias and residual.

A memory per sequence comes by boxes of its own image where no row tile meets two sequences: the rows of another sequence would have to be
zeros on the left, and 0 · NaN would carry one image's NaN into its neighbours' rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.chain import follow
from memvp_kernels.backends.triton.hopper.epilogue import (
    PIECE,
    add_bias,
    finish_stores,
    first_piece,
    load_piece,
    make_buffers,
    pieces_of,
    store_piece,
)
from memvp_kernels.backends.triton.hopper.ring import (
    finish_product,
    load_memory,
    load_product,
    make_ring,
    multiply,
    release,
    start_product,
    wait_full,
)
from memvp_kernels.backends.triton.hopper.walk import corner
from memvp_kernels.backends.triton.segments import memory_row

__all__ = ["gluon_output_kernel"]


@gluon.jit(do_not_specialize=["N", "T", "S", "R"])
def gluon_output_kernel(
    left, right, second_left, second_right, visual, memory, index, bias, residual, y, N, T, S, R,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, K_MAJOR_SECOND: gl.constexpr, OWN: gl.constexpr, DTYPE: gl.constexpr,
    CHAINED: gl.constexpr,
):  # fmt: skip
    """y (N, d) = left · right + second_left · second_right + visual · memory + bias + residual; any of them may be None.

    Programs that stay; tiles: cdiv(N, BLOCK_N) · cdiv(d, BLOCK_D).

    Args:
        memory: (M, d) for all rows, or with OWN (R, M, d) and for each sequence of T rows the image that `index` (S,) says.
    """
    follow(CHAINED)
    ring = make_ring(DTYPE, BLOCK_N, BLOCK_D, BLOCK_K, STAGES)
    buffers = make_buffers(DTYPE, BLOCK_N)
    gl.warp_specialize(
        [
            (_consume, (
                ring, buffers, right, second_right, memory, bias, residual, y, N, F, d, M,
                BLOCK_N, BLOCK_D, GROUP, K_MAJOR, K_MAJOR_SECOND,
            )),
            (_produce, (
                ring, left, right, second_left, second_right, visual, memory, index, residual, N, T, S, R, F, d, M,
                BLOCK_N, BLOCK_D, GROUP, K_MAJOR, K_MAJOR_SECOND, OWN, CHAINED,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _produce(
    ring, left, right, second_left, second_right, visual, memory, index, residual, N, T, S, R,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, K_MAJOR_SECOND: gl.constexpr, OWN: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    follow(CHAINED)
    row_tiles = gl.cdiv(N, BLOCK_N)
    column_tiles: gl.constexpr = (d + BLOCK_D - 1) // BLOCK_D
    step = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = corner(tile, row_tiles, d, BLOCK_N, BLOCK_D, GROUP)
        if right is not None:
            step = load_product(ring, step, left, right, None, row, column, F, K_MAJOR)
        if second_right is not None:
            step = load_product(ring, step, second_left, second_right, None, row, column, F, K_MAJOR_SECOND)
        if memory is not None:
            if OWN:
                read = memory_row(row // T, index, S, R)
                # A sequence without memory reads past the last image, where TMA gives zeros.
                read = gl.where(read < 0, R, read)
                step = load_memory(ring, step, visual, memory, read, row, column, M)
            else:
                step = load_product(ring, step, visual, memory, None, row, column, M, False)
        if residual is not None:
            for i in gl.static_range(BLOCK_D // PIECE):
                step = load_piece(ring, step, residual, None, row, column + i * PIECE)


@gluon.jit
def _consume(
    ring, buffers, right, second_right, memory, bias, residual, y, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, K_MAJOR_SECOND: gl.constexpr,
):  # fmt: skip
    _, _, full, empty = ring
    row_tiles = gl.cdiv(N, BLOCK_N)
    column_tiles: gl.constexpr = (d + BLOCK_D - 1) // BLOCK_D
    step = 0
    sent = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row, column = corner(tile, row_tiles, d, BLOCK_N, BLOCK_D, GROUP)
        acc = start_product(ring)
        previous = -1
        if right is not None:
            acc, step, previous = multiply(acc, ring, step, previous, F, K_MAJOR)
        if second_right is not None:
            acc, step, previous = multiply(acc, ring, step, previous, F, K_MAJOR_SECOND)
        if memory is not None:
            acc, step, previous = multiply(acc, ring, step, previous, M, False)
        pieces = pieces_of(finish_product(acc, ring, previous))
        for i in gl.static_range(len(pieces)):
            piece = add_bias(pieces[i], bias, column + i * PIECE, d)
            if residual is not None:
                piece += first_piece(ring, wait_full(full, step)).to(gl.float32)
                release(empty, step)
                step += 1
            sent = store_piece(piece, buffers, sent, y, row, column + i * PIECE)
    finish_stores()
