"""What happens between an accumulator and device memory: pieces of 64 columns, biases, operands that come by the ring, stores by TMA.

A piece is what the registers hold beside the rest of the accumulator, and a row of it is one row of the swizzle. It leaves through one of
two buffers, asynchronously: the next piece is computed, and the next tile's loads run, while the last one's store reads its buffer.

An epilogue that computes much would keep the tensor cores waiting. So its pieces are rounded and packed when the tile's products end, and
the rest is done while the first products of the program's next tile run (hidden and dHidden, whose loops are short).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from memvp_kernels.backends.triton.hopper.ring import SWIZZLED, accumulator_layout, wait_empty

__all__ = [
    "PIECE",
    "add_bias",
    "finish_stores",
    "first_piece",
    "halves_of",
    "load_piece",
    "make_buffers",
    "packed_pieces",
    "pieces_of",
    "second_piece",
    "store_piece",
    "unpacked",
]

PIECE = gl.constexpr(64)
BUFFERS = gl.constexpr(2)  # a power of two


@gluon.jit
def make_buffers(DTYPE: gl.constexpr, BLOCK_N: gl.constexpr):
    """What pieces leave from, [BUFFERS, BLOCK_N, PIECE]."""
    return gl.allocate_shared_memory(DTYPE, [BUFFERS, BLOCK_N, PIECE], SWIZZLED)


@gluon.jit
def pieces_of(block):
    """The block cut into pieces of PIECE columns, left to right; a thread holds columns of every piece, so no data moves."""
    COLUMNS: gl.constexpr = block.shape[1]
    if COLUMNS <= PIECE:
        return (gl.convert_layout(block, accumulator_layout(COLUMNS, gl.num_warps())),)
    else:
        left, right = halves_of(block)
        return pieces_of(left) + pieces_of(right)


@gluon.jit
def halves_of(block):
    """The left and the right half of the columns."""
    ROWS: gl.constexpr = block.shape[0]
    COLUMNS: gl.constexpr = block.shape[1]
    return block.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)).split()


@gluon.jit
def packed(block, DTYPE: gl.constexpr):
    """A float32 block rounded to DTYPE, two neighbouring columns in a register: [ROWS, COLUMNS // 2] of 32 bits.

    As single 16-bit numbers they took a register each beside the next tile's accumulator, and spilled.
    """
    ROWS: gl.constexpr = block.shape[0]
    COLUMNS: gl.constexpr = block.shape[1]
    even, odd = block.to(DTYPE).to(gl.int16, bitcast=True).reshape((ROWS, COLUMNS // 2, 2)).split()
    return (even.to(gl.int32) & 0xFFFF) | (odd.to(gl.int32) << 16)


@gluon.jit
def unpacked(pairs, DTYPE: gl.constexpr):
    """The block [ROWS, 2 · COLUMNS] in DTYPE of which these are the pairs."""
    ROWS: gl.constexpr = pairs.shape[0]
    COLUMNS: gl.constexpr = 2 * pairs.shape[1]
    even = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    block = gl.join(even, odd).reshape((ROWS, COLUMNS))
    return gl.convert_layout(block, accumulator_layout(COLUMNS, gl.num_warps()))


@gluon.jit
def packed_pieces(block, bias, column, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """The pieces of a float32 block from `column` on, each with its bias (see `add_bias`) and packed."""
    WIDTH: gl.constexpr = block.shape[1]
    if WIDTH <= PIECE:
        piece = gl.convert_layout(block, accumulator_layout(WIDTH, gl.num_warps()))
        return (packed(add_bias(piece, bias, column, COLUMNS), DTYPE),)
    else:
        left, right = halves_of(block)
        first = packed_pieces(left, bias, column, COLUMNS, DTYPE)
        return first + packed_pieces(right, bias, column + WIDTH // 2, COLUMNS, DTYPE)


@gluon.jit
def add_bias(piece, bias, column, COLUMNS: gl.constexpr):
    """piece + bias (COLUMNS,), contiguous and of any float dtype; bias None: piece."""
    if bias is not None:
        LAYOUT: gl.constexpr = gl.SliceLayout(0, accumulator_layout(PIECE, gl.num_warps()))
        o_column = column + gl.arange(0, PIECE, layout=LAYOUT)
        b_bias = gl.load(bias + o_column, mask=o_column < COLUMNS, other=0.0)
        piece += b_bias.to(gl.float32)[None, :]
    return piece


@gluon.jit
def load_piece(ring, step, first, second, row, column):
    """Producer: a piece of one or two epilogue operands, a step; `second` may be None. Returns the next step."""
    tiles_left, _, full, empty = ring
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    stage = wait_empty(empty, step)
    arrived = full.index(stage)
    if second is None:
        mbarrier.expect(arrived, BLOCK_N * PIECE * 2)
    else:
        mbarrier.expect(arrived, 2 * BLOCK_N * PIECE * 2)
        tma.async_copy_global_to_shared(second, [row, column], arrived, _second(ring, stage))
    tma.async_copy_global_to_shared(first, [row, column], arrived, tiles_left.index(stage))
    return step + 1


@gluon.jit
def first_piece(ring, stage):
    """Consumers: the first operand's piece, from a stage that is full."""
    return ring[0].index(stage).load(accumulator_layout(PIECE, gl.num_warps()))


@gluon.jit
def second_piece(ring, stage):
    return _second(ring, stage).load(accumulator_layout(PIECE, gl.num_warps()))


@gluon.jit
def _second(ring, stage):
    """Where the second operand's piece lies in a stage: at the head of its right tile."""
    tiles_left, tiles_right, _, _ = ring
    STAGES: gl.constexpr = tiles_left.shape[0]
    BLOCK_N: gl.constexpr = tiles_left.shape[1]
    PER_STAGE: gl.constexpr = tiles_right.shape[1] // BLOCK_N
    pieces = tiles_right._reinterpret(tiles_right.dtype, [PER_STAGE * STAGES, BLOCK_N, PIECE], SWIZZLED)
    return pieces.index(PER_STAGE * stage)


@gluon.jit
def store_piece(piece, buffers, sent, out, row, column):
    """Round the piece and send it to `out` (rows, columns), which cuts off what lies outside; `sent` counts a program's stores, and one more."""
    buffer = buffers.index(sent & (BUFFERS - 1))
    # All but the latest store have read what they store; that one has the other buffer.
    tma.store_wait(BUFFERS - 1)
    buffer.store(piece.to(buffers.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], buffer)
    return sent + 1


@gluon.jit
def finish_stores():
    """Before a program ends: every store has read its buffer, and the block's shared memory may go."""
    tma.store_wait(0)
