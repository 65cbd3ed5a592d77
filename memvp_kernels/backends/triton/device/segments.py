"""Which sequence a row of x belongs to, which memory row that sequence reads, and how many of its slots.

The device side of :class:`memvp_kernels.problem.Segments`. Nothing read from memory is trusted: bounds are clamped to [0, N], a memory
row outside [0, R) means none (-1), a length outside [0, M] means no slots. A memory that every row shares is one sequence of N rows.

`segments` is the tuple (cu_seqlens, index, lengths, N, T, S, R), of which the three pointers may be None.
"""

import triton
import triton.language as tl

__all__ = ["last_sequence_from", "memory_row", "sequence_bounds", "sequence_of_row", "tile_sequence", "valid_slots"]


@triton.jit
def sequence_of_row(row, segments):
    """The sequence that holds `row`: -1 before the first, S after the last; never an empty one."""
    cu_seqlens, index, lengths, N, T, S, R = segments
    if cu_seqlens is None:
        sequence = row // T
    else:
        sequence = last_sequence_from(row, cu_seqlens, S, 1, 0)
        if sequence == S - 1 and row >= tl.load(cu_seqlens + S):
            sequence = sequence + 1
    return sequence


@triton.jit
def last_sequence_from(limit, cu_seqlens, S, BLOCK, STEP):
    """The greatest sequence s with cu_seqlens[s] // BLOCK + STEP·s <= limit, or -1, by binary search."""
    low = -1
    high = S
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + STEP * middle <= limit:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def sequence_bounds(sequence, segments):
    """(first row, end row) of a sequence; an empty range when there is no such sequence."""
    cu_seqlens, index, lengths, N, T, S, R = segments
    if cu_seqlens is None:
        first = tl.minimum(sequence * T, N)
        end = tl.minimum(first + T, N)
    else:
        known = (sequence >= 0) & (sequence < S)
        first = tl.load(cu_seqlens + sequence, mask=known, other=0)
        end = tl.load(cu_seqlens + sequence + 1, mask=known, other=0)
        first = tl.minimum(tl.maximum(first, 0), N)
        end = tl.minimum(tl.maximum(end, first), N)
    return first, end


@triton.jit
def tile_sequence(q, segments, BLOCK: tl.constexpr):
    """The q-th pair of a row tile and a sequence that overlap, as (tile, sequence), for q in [0, cdiv(N, BLOCK) + S).

    Walking down the rows passes either a tile's edge or a sequence's, so (tile t, sequence s) has the number t + s, and the
    sequences of a packed batch need no table on the host. Some pairs share no row: their program has nothing to do.
    """
    cu_seqlens, index, lengths, N, T, S, R = segments
    if cu_seqlens is None:
        # s·T // BLOCK + s <= q, solved by an estimate that is at most one off.
        sequence = tl.minimum((q.to(tl.int64) * BLOCK // (T + BLOCK)).to(tl.int32) + 1, S - 1)
        while (sequence > 0) & (sequence.to(tl.int64) * T // BLOCK + sequence > q):
            sequence = sequence - 1
    else:
        sequence = tl.maximum(last_sequence_from(q, cu_seqlens, S, BLOCK, 1), 0)
    return q - sequence, sequence


@triton.jit
def memory_row(sequence, segments):
    """The memory row that a sequence reads, or -1."""
    cu_seqlens, index, lengths, N, T, S, R = segments
    if index is None:
        row = sequence
    else:
        row = tl.load(index + sequence, mask=(sequence >= 0) & (sequence < S), other=-1).to(tl.int32)
    return tl.where((row >= 0) & (row < R) & (sequence < S), row, -1)


@triton.jit
def valid_slots(row, lengths, M):
    """How many slots of a memory row are valid; none for row -1."""
    if lengths is None:
        slots = tl.where(row >= 0, M, 0)
    else:
        slots = tl.load(lengths + row, mask=row >= 0, other=0).to(tl.int32)
        slots = tl.where((slots >= 0) & (slots <= M), slots, 0)
    return slots
