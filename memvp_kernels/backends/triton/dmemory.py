"""Gradients of the memory: dKv = dSᵀ x and dVv = visualᵀ dy of every memory row, summed over the sequences that read it, in one launch.

One program owns a tile of one row's gradient and walks through that row's sequences in order: no atomics, no padding, the same
bits every time. A sequence is a descriptor whose rows end where it ends, so that its ragged tail is filled with zeros by the copy
engine, and which of the two products a program works on is a choice between pointers, not between loops.

The gradients of what the batch shares (positions, the basis of a factored memory) are the same product over all rows of x; there the
rows are cut into parts of equal length, a fixed number for a shape, and the parts' sums are added up in float32.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton import backward_tiles, launch
from memvp_kernels.backends.triton.operands import BY_POINTER, BY_ROW, load_tile
from memvp_kernels.backends.triton.segments import sequence_bounds, valid_slots
from memvp_kernels.problem import Segments

__all__ = ["Pair", "core_gradient", "dense_gradients", "dmemory_bwd_kernel", "memory_gradients"]

_SCAN = 256  # entries of the index that a program looks at together

Pair = tuple[Tensor, Tensor]


def memory_gradients(pairs: Sequence[Pair], segments: Segments, memories: int, dtype: torch.dtype) -> list[Tensor]:
    """For each (left, right) the sum of left[n]ᵀ right[n] over the rows n that read a memory row, for every memory row.

    Args:
        pairs: one or two of left (N, M) and right (N, d), rows contiguous, each pair of the same shapes.
        segments: which rows read which memory row.
        memories: R.
        dtype: of the results; sums are float32 until then.

    Returns:
        one (R, M, d) for each pair; exact zeros for a row that nobody reads and for slots past its length.
    """
    if not segments.shared:
        return _launch(pairs, segments, memories, dtype)
    grads = [g[None] for g in dense_gradients(pairs, dtype)]
    if segments.lengths is not None:
        slots = grads[0].shape[1]
        valid = torch.where((segments.lengths >= 0) & (segments.lengths <= slots), segments.lengths, 0)
        past = torch.arange(slots, device=valid.device)[None, :] >= valid[:, None]
        grads = [g.masked_fill_(past[:, :, None], 0) for g in grads]
    return grads


def core_gradient(pairs: tuple[Pair, Pair], segments: Segments, memories: int, total: Tensor | None) -> Tensor:
    """The sum of both pairs' gradients in one, for a core that is key and value; arguments as `memory_gradients`.

    Args:
        total: (R, M, d) float32, contiguous, to which it is added in place; or None.

    Returns:
        `total`, or a new (R, M, d) in float32.
    """
    if not segments.shared:
        return _launch(pairs, segments, memories, torch.float32, [total], together=True)[0]
    key, value = memory_gradients(pairs, segments, memories, torch.float32)
    return key.add_(value) if total is None else total.add_(key).add_(value)


def dense_gradients(
    pairs: Sequence[Pair], dtype: torch.dtype, totals: Sequence[Tensor | None] = (None, None)
) -> list[Tensor]:
    """leftᵀ right over all rows, (M, d) for each pair; arguments as `memory_gradients`.

    Args:
        totals: for every pair a contiguous (M, d) float32 to which its product is added in place, or for none.
    """
    left, right = pairs[0]
    rows, slots, width = right.shape[0], left.shape[1], right.shape[1]
    tile = backward_tiles.dmemory_tile(
        launch.chip(right.device), right.dtype, launch.precision(right.dtype), width=width, descriptors=_describable(pairs)
    )  # fmt: skip
    outputs = len(pairs) * launch.programs(slots, tile.block_n) * launch.programs(width, tile.columns)
    steps = triton.next_power_of_2(launch.programs(rows, tile.block_k))
    splits = backward_tiles.row_splits(launch.chip(right.device).multiprocessors, outputs, steps)
    if splits == 1:
        return [g.view(slots, width) for g in _launch(pairs, Segments(rows, 1, rows), 1, dtype, totals)]
    parts = _launch(pairs, Segments(rows, splits, launch.programs(rows, splits)), splits, torch.float32)
    sums = [p.sum(0).to(dtype) for p in parts]
    return [s if t is None else t.add_(s) for s, t in zip(sums, totals, strict=False)]


def _describable(pairs: Sequence[Pair]) -> bool:
    return all(launch.describable(t) for pair in pairs for t in pair)


def _launch(
    pairs: Sequence[Pair],
    segments: Segments,
    memories: int,
    dtype: torch.dtype,
    totals: Sequence[Tensor | None] = (None,),
    *,
    together: bool = False,
) -> list[Tensor]:
    """One (R, M, d) for each pair, or with `together` one for both; `totals` (all or none) are added to and are the results."""
    (left, right), (other_left, other_right) = pairs[0], pairs[-1]
    slots, width = left.shape[1], right.shape[1]
    count = 1 if together else len(pairs)
    adds = totals[0] is not None
    assert not adds or segments.lengths is None, "slots past a length are set to zero"
    outs = [
        t if t is not None else torch.empty(memories, slots, width, dtype=dtype, device=right.device)
        for t in (totals if adds else (None,) * count)
    ]
    aligned = _describable(pairs)
    tma = aligned and launch.has_tma(right.device)
    precision = launch.precision(right.dtype)
    tile = backward_tiles.dmemory_tile(
        launch.chip(right.device), right.dtype, precision, width=width, descriptors=aligned, together=together
    )
    tiles = launch.programs(slots, tile.block_n) * launch.programs(width, tile.columns)

    def run() -> None:
        # Descriptors built on the device need room there, for the length of the launch.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=right.device))
        dmemory_bwd_kernel[(count * memories * tiles,)](
            left, right, outs[0], other_left, other_right, outs[-1],
            segments.cu_seqlens, segments.index, segments.lengths,
            left.stride(0), right.stride(0), other_left.stride(0), other_right.stride(0),
            segments.rows, segments.length or 0, segments.sequences, memories,
            M=slots, d=width, BLOCK_M=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, SCAN=_SCAN,
            TOGETHER=together, ADDS=adds, FORM=(BY_ROW if tma else BY_POINTER).value, PRECISION=precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    with launch.on_device(right):
        # In a context of its own, so that the allocator is nobody else's.
        contextvars.copy_context().run(run)
    return outs


@triton.jit(do_not_specialize=["N", "T", "S", "R"])
def dmemory_bwd_kernel(
    left, right, out, other_left, other_right, other_out, cu_seqlens, index, lengths,
    stride_left_n, stride_right_n, stride_other_left_n, stride_other_right_n,
    N, T, S, R, M: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SCAN: tl.constexpr, TOGETHER: tl.constexpr, ADDS: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile (BLOCK_M, BLOCK_D) of one memory row's gradient; the second pair's programs come after the first's.

    With TOGETHER there is one result, the sum of both pairs' products. With ADDS it is added to what is there.
    """
    SLOT_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (d + BLOCK_D - 1) // BLOCK_D
    # Tiles of one block of columns side by side: they share x's columns in L2.
    slot = tl.program_id(0) % SLOT_TILES * BLOCK_M
    column = tl.program_id(0) // SLOT_TILES % COLUMN_TILES * BLOCK_D
    read = tl.program_id(0) // (SLOT_TILES * COLUMN_TILES)
    if read >= R:
        read = read - R
        left = other_left
        right = other_right
        out = other_out
        stride_left_n = stride_other_left_n
        stride_right_n = stride_other_right_n

    o_slot = slot + tl.arange(0, BLOCK_M)
    o_column = column + tl.arange(0, BLOCK_D)
    inside = (o_slot[:, None] < M) & (o_column[None, :] < d)
    o_out = (tl.cast(read, tl.int64) * M + o_slot.to(tl.int64)[:, None]) * d + o_column[None, :]
    if ADDS:
        # Read before the loop, as what it adds to: after it there would be two tiles in registers, which spilled on sm_90.
        acc = tl.load(out + o_out, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _add_readers(
        acc, left, right, read, slot, column, cu_seqlens, index, stride_left_n, stride_right_n, N, T, S,
        M, d, BLOCK_M, BLOCK_D, BLOCK_K, SCAN, FORM, PRECISION,
    )  # fmt: skip
    if TOGETHER:
        acc = _add_readers(
            acc, other_left, other_right, read, slot, column, cu_seqlens, index, stride_other_left_n, stride_other_right_n, N, T, S,
            M, d, BLOCK_M, BLOCK_D, BLOCK_K, SCAN, FORM, PRECISION,
        )  # fmt: skip

    if lengths is not None:
        # Left is zero there, but 0 · NaN would not be.
        acc = tl.where(o_slot[:, None] < valid_slots(read, lengths, M), acc, 0.0)
    tl.store(out + o_out, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_readers(
    acc, left, right, read, slot, column, cu_seqlens, index, stride_left_n, stride_right_n, N, T, S, M: tl.constexpr, d: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + leftᵀ right over the rows of the sequences that read memory row `read`, in order."""
    if index is None:
        first, end = sequence_bounds(read, cu_seqlens, S, T, N)
        acc = _add_sequence(
            acc, left, right, first, end, slot, column, stride_left_n, stride_right_n, M, d, BLOCK_M, BLOCK_D, BLOCK_K, FORM, PRECISION
        )  # fmt: skip
    else:
        for start in tl.range(0, S, SCAN):
            o_sequence = start + tl.arange(0, SCAN)
            reads = tl.load(index + o_sequence, mask=o_sequence < S, other=-1) == read
            sequence = start - 1
            for _ in tl.range(0, tl.sum(reads.to(tl.int32))):
                sequence = tl.min(tl.where(reads & (o_sequence > sequence), o_sequence, S))
                first, end = sequence_bounds(sequence, cu_seqlens, S, T, N)
                acc = _add_sequence(
                    acc, left, right, first, end, slot, column, stride_left_n, stride_right_n, M, d, BLOCK_M, BLOCK_D, BLOCK_K, FORM, PRECISION
                )  # fmt: skip
    return acc


@triton.jit
def _add_sequence(
    acc, left, right, first, end, slot, column, stride_left_n, stride_right_n, M: tl.constexpr, d: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + leftᵀ right over rows [first, end)."""
    if FORM == BY_ROW:
        left = tl.make_tensor_descriptor(left, [end, M], [tl.cast(stride_left_n, tl.int64), 1], [BLOCK_K, BLOCK_M])
        right = tl.make_tensor_descriptor(right, [end, d], [tl.cast(stride_right_n, tl.int64), 1], [BLOCK_K, BLOCK_D])
    for k in tl.range(first, end, BLOCK_K):
        b_left = load_tile(left, k, slot, end, M, stride_left_n, 1, BLOCK_K, BLOCK_M, FORM, False, M % BLOCK_M == 0)
        b_right = load_tile(
            right, k, column, end, d, stride_right_n, 1, BLOCK_K, BLOCK_D, FORM, False, d % BLOCK_D == 0
        )
        acc = tl.dot(b_left.T, b_right, acc, input_precision=PRECISION)
    return acc
