"""dHidden in Gluon: dy Vᵀ with the activation's derivative in its epilogue, then dy times a shared memory.

The pre-activations come to the epilogue by the ring, a step for each piece of 64 columns: they are under way while the last products run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.activations import activate_derivative
from memvp_kernels.backends.triton.hopper.columns import load_columns, multiply_columns
from memvp_kernels.backends.triton.hopper.epilogue import (
    PIECE,
    finish_stores,
    load_pieces,
    make_buffers,
    pieces_of,
    store_piece,
    take_pieces,
)
from memvp_kernels.backends.triton.hopper.ring import finish_product, load_product, make_ring, multiply, start_product
from memvp_kernels.backends.triton.hopper.walk import corner

__all__ = ["gluon_dhidden_kernel"]


@gluon.jit(do_not_specialize=["N"])
def gluon_dhidden_kernel(
    grad, value, pre_first, pre_second, dpre_first, dpre_second, memory, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Programs that stay; tiles: cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the shared memory's.

    Args:
        value, memory: None: without the tiles of that product.
        pre_first, dpre_first: gate's, or key's where there is no gate; a tile of dpre is stored after it was read of pre.
        pre_second, dpre_second: key's beside gate's, or None.
    """
    ring = make_ring(DTYPE, BLOCK_N, BLOCK_F, BLOCK_K, STAGES)
    buffers = make_buffers(DTYPE, BLOCK_N)
    gl.warp_specialize(
        [
            (_consume, (
                ring, buffers, value, pre_second, dpre_first, dpre_second, memory, columns, N, F, d, M,
                BLOCK_N, BLOCK_F, GROUP, K_MAJOR, ACTIVATION,
            )),
            (_produce, (
                ring, grad, value, pre_first, pre_second, memory, N, F, d, M, BLOCK_N, BLOCK_F, GROUP, K_MAJOR,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _produce(
    ring, grad, value, pre_first, pre_second, memory, N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    if value is not None:
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            step = load_product(ring, step, grad, value, None, row, column, d, K_MAJOR)
            step = load_pieces(ring, step, pre_first, pre_second, row, column)
    if memory is not None:
        load_columns(ring, step, grad, memory, ffn_tiles, row_tiles, M, d, GROUP)


@gluon.jit
def _consume(
    ring, buffers, value, pre_second, dpre_first, dpre_second, memory, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    GATED: gl.constexpr = pre_second is not None
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    if value is not None:
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            acc = start_product(ring)
            acc, step = multiply(acc, ring, step, d, K_MAJOR, True)
            pieces = pieces_of(finish_product(acc, ring, step))
            finish_stores()
            for i in gl.static_range(len(pieces)):
                here = column + i * PIECE
                b_first, b_key, step = take_pieces(ring, step, GATED)
                b_active, b_slope = activate_derivative(b_first, ACTIVATION)
                if GATED:
                    store_piece(pieces[i] * b_key * b_slope, buffers, 0, dpre_first, row, here)
                    store_piece(pieces[i] * b_active, buffers, 1, dpre_second, row, here)
                else:
                    store_piece(pieces[i] * b_slope, buffers, i, dpre_first, row, here)
    if memory is not None:
        multiply_columns(ring, step, buffers, columns, ffn_tiles, row_tiles, M, d, GROUP)
    finish_stores()
