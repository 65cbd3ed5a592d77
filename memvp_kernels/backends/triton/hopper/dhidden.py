"""dHidden in Gluon: dy Vᵀ with the activation's derivative in its epilogue, then dy times a shared memory.

The pre-activations come to the epilogue by the ring, a step for each piece of 64 columns: they are under way while the last products run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from memvp_kernels.backends.triton.activations import activate_derivative
from memvp_kernels.backends.triton.chain import follow
from memvp_kernels.backends.triton.hopper.columns import load_columns, multiply_columns
from memvp_kernels.backends.triton.hopper.epilogue import (
    PIECE,
    finish_stores,
    first_piece,
    load_piece,
    make_buffers,
    packed_pieces,
    second_piece,
    store_piece,
    unpacked,
)
from memvp_kernels.backends.triton.hopper.ring import (
    accumulator_layout,
    begin_step,
    end_step,
    finish_product,
    load_product,
    load_step,
    make_ring,
    multiply,
    release,
    start_product,
    wait_full,
)
from memvp_kernels.backends.triton.hopper.walk import corner

__all__ = ["gluon_dhidden_kernel"]


@gluon.jit(do_not_specialize=["N"])
def gluon_dhidden_kernel(
    grad, value, pre_first, pre_second, dpre_first, dpre_second, memory, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
    CHAINED: gl.constexpr,
):  # fmt: skip
    """Programs that stay; tiles: cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the shared memory's.

    Args:
        value, memory: None: without the tiles of that product.
        pre_first, dpre_first: gate's, or key's where there is no gate; a tile of dpre is stored after it was read of pre.
        pre_second, dpre_second: key's beside gate's, or None.
    """
    LATER: gl.constexpr = _waiting(BLOCK_F // PIECE, pre_second is not None, ACTIVATION)
    follow(CHAINED)
    ring = make_ring(DTYPE, BLOCK_N, BLOCK_F, BLOCK_K, STAGES)
    buffers = make_buffers(DTYPE, BLOCK_N)
    gl.warp_specialize(
        [
            (_consume, (
                ring, buffers, value, pre_second, dpre_first, dpre_second, memory, columns, N, F, d, M,
                BLOCK_N, BLOCK_F, GROUP, K_MAJOR, ACTIVATION, LATER,
            )),
            (_produce, (
                ring, grad, value, pre_first, pre_second, memory, N, F, d, M, BLOCK_N, BLOCK_F, GROUP, K_MAJOR, LATER, CHAINED,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.constexpr_function
def _waiting(pieces, gated, activation):
    """How many of a tile's pieces may wait beside the next one's accumulator; one more of the wide tile's four spilled 8 to 104 bytes."""
    if not gated:
        return min(pieces, 3)
    return pieces if pieces <= 2 else 0 if activation == "gelu" else 2


@gluon.jit
def _produce(
    ring, grad, value, pre_first, pre_second, memory, N, F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, LATER: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    NOW: gl.constexpr = BLOCK_F // PIECE - LATER
    follow(CHAINED)
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    if value is not None:
        last_row = row_tiles * BLOCK_N
        last_column = NOW * PIECE
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            for i in gl.static_range(LATER):
                if i * BLOCK_K < d:
                    step = load_step(ring, step, grad, value, None, row, column, i * BLOCK_K, K_MAJOR)
                step = load_piece(ring, step, pre_first, pre_second, last_row, last_column + i * PIECE)
            step = load_product(ring, step, grad, value, None, row, column, d, K_MAJOR, LATER * BLOCK_K)
            for i in gl.static_range(NOW):
                step = load_piece(ring, step, pre_first, pre_second, row, column + i * PIECE)
            last_row = row
            last_column = column + NOW * PIECE
        for i in gl.static_range(LATER):
            step = load_piece(ring, step, pre_first, pre_second, last_row, last_column + i * PIECE)
    if memory is not None:
        load_columns(ring, step, grad, memory, ffn_tiles, row_tiles, M, d, GROUP)


@gluon.jit
def _consume(
    ring, buffers, value, pre_second, dpre_first, dpre_second, memory, columns, N,
    F: gl.constexpr, d: gl.constexpr, M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_F: gl.constexpr, GROUP: gl.constexpr, K_MAJOR: gl.constexpr, ACTIVATION: gl.constexpr, LATER: gl.constexpr,
):  # fmt: skip
    """A tile's dHidden waits, rounded, until the first products of the next one run: its epilogue is beside those."""
    DTYPE: gl.constexpr = buffers.dtype
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    NOW: gl.constexpr = BLOCK_F // PIECE - LATER
    row_tiles = gl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * ((F + BLOCK_F - 1) // BLOCK_F)
    step = 0
    sent = 0
    if value is not None:
        # Before a program's first tile waits one below the last row, of which nothing is stored.
        nothing = gl.zeros((BLOCK_N, BLOCK_F), gl.float32, accumulator_layout(BLOCK_F, gl.num_warps()))
        last = packed_pieces(nothing, None, 0, F, DTYPE)[NOW:]
        last_row = row_tiles * BLOCK_N
        last_column = NOW * PIECE
        for tile in range(gl.program_id(0), ffn_tiles, gl.num_programs(0)):
            row, column = corner(tile, row_tiles, F, BLOCK_N, BLOCK_F, GROUP)
            acc = start_product(ring)
            previous = -1
            for i in gl.static_range(LATER):
                begun = step
                if i * BLOCK_K < d:
                    acc = begin_step(acc, ring, step, K_MAJOR)
                    step += 1
                step, sent = _store_piece(
                    last[i], ring, step, buffers, sent, pre_second, dpre_first, dpre_second, last_row, last_column + i * PIECE,
                    ACTIVATION,
                )  # fmt: skip
                if i * BLOCK_K < d:
                    acc = end_step(acc, ring, previous)
                    previous = begun
            acc, step, previous = multiply(acc, ring, step, previous, d, K_MAJOR, LATER * BLOCK_K)
            pieces = packed_pieces(finish_product(acc, ring, previous), None, 0, F, DTYPE)
            for i in gl.static_range(NOW):
                step, sent = _store_piece(
                    pieces[i], ring, step, buffers, sent, pre_second, dpre_first, dpre_second, row, column + i * PIECE, ACTIVATION
                )  # fmt: skip
            last = pieces[NOW:]
            last_row = row
            last_column = column + NOW * PIECE
        for i in gl.static_range(LATER):
            step, sent = _store_piece(
                last[i], ring, step, buffers, sent, pre_second, dpre_first, dpre_second, last_row, last_column + i * PIECE,
                ACTIVATION,
            )  # fmt: skip
    if memory is not None:
        multiply_columns(ring, step, buffers, sent, columns, ffn_tiles, row_tiles, M, d, GROUP)
    finish_stores()


@gluon.jit
def _store_piece(
    pairs, ring, step, buffers, sent, pre_second, dpre_first, dpre_second, row, column, ACTIVATION: gl.constexpr
):
    """A piece of the gradients of the pre-activations, which the ring has next; returns the next step, and counts `sent` on."""
    # What is alive at once decides how many pieces may wait. Tanh's derivative leaves room for key's value beside it, the others only
    # after key's gradient has left: each the other way round spilled 8 to 104 bytes.
    EARLY: gl.constexpr = ACTIVATION == "gelu_tanh"
    _, _, full, empty = ring
    b_dhidden = unpacked(pairs, buffers.dtype).to(gl.float32)
    stage = wait_full(full, step)
    b_first = first_piece(ring, stage)
    if pre_second is not None and EARLY:
        b_key = second_piece(ring, stage)
        release(empty, step)
        b_active, b_slope = activate_derivative(b_first.to(gl.float32), ACTIVATION)
        sent = store_piece(b_dhidden * b_key.to(gl.float32) * b_slope, buffers, sent, dpre_first, row, column)
        sent = store_piece(b_dhidden * b_active, buffers, sent, dpre_second, row, column)
    else:
        b_active, b_slope = activate_derivative(b_first.to(gl.float32), ACTIVATION)
        if pre_second is not None:
            sent = store_piece(b_dhidden * b_active, buffers, sent, dpre_second, row, column)
            b_dhidden *= second_piece(ring, stage).to(gl.float32)
        release(empty, step)
        sent = store_piece(b_dhidden * b_slope, buffers, sent, dpre_first, row, column)
    return step + 1, sent
