"""The hidden kernel in Gluon: x Gᵀ beside x Kᵀ in one accumulator, biases and activation in its epilogue, then a shared memory's columns.

One instruction multiplies a row tile by 128 rows of gate and the same of key, wherever the two weights lie.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.activations import activate
from memvp_kernels.backends.triton.chain import follow
from memvp_kernels.backends.triton.hopper.columns import load_columns, multiply_columns
from memvp_kernels.backends.triton.hopper.epilogue import (
    PIECE,
    finish_stores,
    halves_of,
    make_buffers,
    packed_pieces,
    store_piece,
    unpacked,
)
from memvp_kernels.backends.triton.hopper.ring import (
    accumulator_layout,
    begin_step,
    end_step,
    finish_product,
    load_product,
    make_ring,
    multiply,
    start_product,
)
from memvp_kernels.backends.triton.hopper.walk import corner

__all__ = ["gluon_hidden_kernel"]


@gluon.jit(do_not_specialize=["N"])
def gluon_hidden_kernel(
    x, gate, key, gate_bias, key_bias, memory, hidden, pre_gate, pre_key, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
    CHAINED: gl.constexpr,
):  # fmt: skip
    """Programs that stay; tiles: cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the shared memory's.

    Args:
        gate: None: key alone, BLOCK_F columns of it; otherwise as many of each.
        key, memory: None: without the tiles of that product.
        hidden, pre_gate, pre_key, columns: None where not asked for.
    """
    follow(CHAINED)
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
                ring, x, gate, key, memory, N, F, d, M, BLOCK_N, BLOCK_F, GROUP, K_MAJOR, CHAINED,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _produce(
    ring, x, gate, key, memory, N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    follow(CHAINED)
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


@gluon.constexpr_function
def _waiting(pieces, gated, activation):
    """How many of a tile's pieces may wait: a fourth of one branch spilled 8 bytes, a third beside erf's coefficients as many."""
    return pieces if gated else min(pieces, 2 if activation == "gelu" else 3)


@gluon.jit
def _consume(
    ring, buffers, gate, key, gate_bias, key_bias, memory, hidden, pre_gate, pre_key, columns,
    N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A tile's pre-activations wait, rounded, until the first products of the next one run: the rest of the epilogue is beside those."""
    GATED: gl.constexpr = gate is not None
    DTYPE: gl.constexpr = buffers.dtype
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    PIECES: gl.constexpr = BLOCK_F // PIECE
    LATER: gl.constexpr = _waiting(PIECES, GATED, ACTIVATION)
    NOW: gl.constexpr = PIECES - LATER
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    sent = 0
    if key is not None:
        # Before a program's first tile waits one below the last row, of which nothing is stored.
        nothing = gl.zeros((BLOCK_N, BLOCK_F), gl.float32, accumulator_layout(BLOCK_F, gl.num_warps()))
        last_key = packed_pieces(nothing, None, 0, F, DTYPE)[NOW:]
        if GATED:
            last_gate = last_key
        last_row = row_tiles * BLOCK_N
        last_column = NOW * PIECE
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            acc = start_product(ring)
            previous = -1
            for i in gl.static_range(LATER):
                if i * BLOCK_K < d:
                    acc = begin_step(acc, ring, step, K_MAJOR)
                b_gate = last_gate[i] if GATED else None
                sent = _store_piece(
                    b_gate,
                    last_key[i],
                    buffers,
                    sent,
                    hidden,
                    pre_gate,
                    pre_key,
                    last_row,
                    last_column + i * PIECE,
                    ACTIVATION,
                )
                if i * BLOCK_K < d:
                    acc = end_step(acc, ring, previous)
                    previous = step
                    step += 1
            acc, step, previous = multiply(acc, ring, step, previous, d, K_MAJOR, LATER * BLOCK_K)
            done = finish_product(acc, ring, previous)
            if GATED:
                acc_gate, acc_key = halves_of(done)
                gate_pieces = packed_pieces(acc_gate, gate_bias, column, F, DTYPE)
                last_gate = gate_pieces[NOW:]
            else:
                acc_key = done
            key_pieces = packed_pieces(acc_key, key_bias, column, F, DTYPE)
            last_key = key_pieces[NOW:]
            for i in gl.static_range(NOW):
                b_gate = gate_pieces[i] if GATED else None
                sent = _store_piece(
                    b_gate, key_pieces[i], buffers, sent, hidden, pre_gate, pre_key, row, column + i * PIECE, ACTIVATION
                )
            last_row = row
            last_column = column + NOW * PIECE
        for i in gl.static_range(LATER):
            b_gate = last_gate[i] if GATED else None
            sent = _store_piece(
                b_gate,
                last_key[i],
                buffers,
                sent,
                hidden,
                pre_gate,
                pre_key,
                last_row,
                last_column + i * PIECE,
                ACTIVATION,
            )
    if memory is not None:
        multiply_columns(ring, step, buffers, sent, columns, ffn_tiles, row_tiles, M, d, GROUP)
    finish_stores()


@gluon.jit
def _store_piece(
    gate_pairs, key_pairs, buffers, sent, hidden, pre_gate, pre_key, row, column, ACTIVATION: gl.constexpr
):
    """A piece of the pre-activations that the backward keeps, and of hidden; `gate_pairs` is None without a gate. Counts `sent` on."""
    b_key = unpacked(key_pairs, buffers.dtype)
    if gate_pairs is not None:
        b_gate = unpacked(gate_pairs, buffers.dtype)
        if pre_gate is not None:
            sent = store_piece(b_gate, buffers, sent, pre_gate, row, column)
    if pre_key is not None:
        sent = store_piece(b_key, buffers, sent, pre_key, row, column)
    if hidden is not None:
        if gate_pairs is not None:
            b_hidden = activate(b_gate.to(gl.float32), ACTIVATION) * b_key.to(gl.float32)
        else:
            b_hidden = activate(b_key.to(gl.float32), ACTIVATION)
        sent = store_piece(b_hidden, buffers, sent, hidden, row, column)
    return sent
