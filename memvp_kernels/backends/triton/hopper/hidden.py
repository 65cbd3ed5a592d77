"""The hidden kernel in Gluon: x Gᵀ beside x Kᵀ in one accumulator, biases and activation in its epilogue, then a shared memory's columns.

One instruction multiplies a row tile by 128 rows of gate and the same of key, wherever the two weights lie.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.activations import activate
from memvp_kernels.backends.triton.hopper.columns import load_columns, multiply_columns
from memvp_kernels.backends.triton.hopper.epilogue import (
    PIECE,
    add_bias,
    finish_stores,
    halves_of,
    make_buffers,
    pieces_of,
    store_piece,
)
from memvp_kernels.backends.triton.hopper.ring import finish_product, load_product, make_ring, multiply, start_product
from memvp_kernels.backends.triton.hopper.walk import corner

__all__ = ["gluon_hidden_kernel"]


@gluon.jit(do_not_specialize=["N"])
def gluon_hidden_kernel(
    x, gate, key, gate_bias, key_bias, memory, hidden, pre_gate, pre_key, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Programs that stay; tiles: cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the shared memory's.

    Args:
        gate: None: key alone, BLOCK_F columns of it; otherwise as many of each.
        key, memory: None: without the tiles of that product.
        hidden, pre_gate, pre_key, columns: None where not asked for.
    """
    WIDE: gl.constexpr = BLOCK_F if gate is None else 2 * BLOCK_F
    ring = make_ring(DTYPE, BLOCK_N, WIDE, BLOCK_K, STAGES)
    buffers = make_buffers(DTYPE, BLOCK_N)
    gl.warp_specialize(
        [
            (_consume, (
                ring, buffers, gate, key, gate_bias, key_bias, memory, hidden, pre_gate, pre_key, columns,
                N, F, d, M, BLOCK_N, BLOCK_F, GROUP, K_MAJOR, ACTIVATION,
            )),
            (_produce, (
                ring, x, gate, key, memory, N, F, d, M, BLOCK_N, BLOCK_F, GROUP, K_MAJOR,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _produce(
    ring, x, gate, key, memory, N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    if key is not None:
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            if gate is None:
                step = load_product(ring, step, x, key, None, row, column, d, K_MAJOR)
            else:
                step = load_product(ring, step, x, gate, key, row, column, d, K_MAJOR)
    if memory is not None:
        load_columns(ring, step, x, memory, ffn_tiles, row_tiles, M, d, GROUP)


@gluon.jit
def _consume(
    ring, buffers, gate, key, gate_bias, key_bias, memory, hidden, pre_gate, pre_key, columns,
    N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    if key is not None:
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            acc = start_product(ring)
            acc, step = multiply(acc, ring, step, d, K_MAJOR, True)
            _store_hidden(
                finish_product(acc, ring, step), buffers, gate, gate_bias, key_bias, hidden, pre_gate, pre_key,
                row, column, F, ACTIVATION,
            )  # fmt: skip
    if memory is not None:
        multiply_columns(ring, step, buffers, columns, ffn_tiles, row_tiles, M, d, GROUP)
    finish_stores()


@gluon.jit
def _store_hidden(
    acc, buffers, gate, gate_bias, key_bias, hidden, pre_gate, pre_key, row, column,
    F: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Biases, the pre-activations that the backward keeps, and hidden; `gate` says only whether there is one."""
    GATED: gl.constexpr = gate is not None
    KEPT: gl.constexpr = pre_key is not None
    STORES: gl.constexpr = (1 + GATED if KEPT else 0) + (hidden is not None)
    if GATED:
        acc_gate, acc_key = halves_of(acc)
        gate_pieces, key_pieces = pieces_of(acc_gate), pieces_of(acc_key)
    else:
        key_pieces = pieces_of(acc)
        gate_pieces = key_pieces
    finish_stores()
    for i in gl.static_range(len(key_pieces)):
        here = column + i * PIECE
        b_key = add_bias(key_pieces[i], key_bias, here, F)
        if GATED:
            b_gate = add_bias(gate_pieces[i], gate_bias, here, F)
            if KEPT:
                store_piece(b_gate, buffers, i * STORES, pre_gate, row, here)
        if KEPT:
            store_piece(b_key, buffers, i * STORES + GATED, pre_key, row, here)
        if hidden is not None:
            b_hidden = activate(b_gate, ACTIVATION) * b_key if GATED else activate(b_key, ACTIVATION)
            store_piece(b_hidden, buffers, i * STORES + STORES - 1, hidden, row, here)
