"""Gradients of the memory: dKv = dSᵀ x and dVv = visualᵀ dy of every memory row, summed over the sequences that read it, in one launch.

One program owns a tile of one memory row's gradient and walks through the sequences that read it in order: no atomics, the same bits
every time. What the batch shares (positions, the basis) gets the same product over all rows of x that read any memory, with split-K.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, TMA, load_tile
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, sequence_of_row, valid_slots
from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["Pair", "core_gradient", "dense_gradients", "dmemory_bwd_kernel", "memory_gradients"]

_SCAN = 256  # entries of the index that a program looks at together

Pair = tuple[Tensor, Tensor]


def memory_gradients(
    pairs: Sequence[Pair],
    segments: Segments,
    memories: int,
    dtype: torch.dtype,
    totals: Sequence[Tensor | None] = (None, None),
) -> list[Tensor]:
    """For each (left, right) the sum of left[n]ᵀ right[n] over the rows n that read a memory row, for every memory row.

    Args:
        pairs: one or two of left (N, M) and right (N, d), rows contiguous, each pair of the same shapes.
        segments: which rows read which memory row.
        memories: R.
        dtype: of the results; sums are float32 until then.
        totals: for every pair a contiguous float32 (R, M, d) to which its result is added in place, or for none; without lengths.

    Returns:
        one (R, M, d) for each pair; exact zeros for a row that nobody reads and for slots past its length.
    """
    if not segments.shared:
        return _launch(pairs, segments, memories, dtype, totals)
    slots = pairs[0][0].shape[1]
    first = [t if t is None else t[0] for t in totals]
    grads = [g[None] for g in dense_gradients(pairs, segments, memories, slots, dtype, first)]
    if segments.lengths is not None:
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
    pairs: Sequence[Pair],
    segments: Segments,
    memories: int,
    slots: int,
    dtype: torch.dtype,
    totals: Sequence[Tensor | None] = (None, None),
) -> list[Tensor]:
    """leftᵀ right over all rows that read a memory, (columns of left, d) for each pair; arguments as `memory_gradients`.

    Args:
        slots: M, which `segments.lengths` are held against; left may have other columns.
        totals: for every pair a contiguous float32 to which its product is added in place, or for none.
    """
    left, right = pairs[0]
    rows, columns, width = right.shape[0], left.shape[1], right.shape[1]
    tile = backward_tiles.dmemory_tile(
        launch.chip(right.device), right.dtype, launch.precision(right.dtype), width=width, descriptors=_support_tma(pairs)
    )  # fmt: skip
    outputs = len(pairs) * launch.programs(columns, tile.block_n) * launch.programs(width, tile.columns)
    steps = triton.next_power_of_2(launch.programs(rows, tile.block_k))
    splits = backward_tiles.row_splits(launch.chip(right.device).multiprocessors, outputs, steps)
    if splits == 1:
        sums = _launch(pairs, segments, memories, dtype, totals, splits=1, slots=slots)
        return [g.view(columns, width) for g in sums]
    partials = _launch(pairs, segments, memories, torch.float32, splits=splits, slots=slots)
    sums = [p.sum(0).to(dtype) for p in partials]
    return [s if t is None else t.add_(s) for s, t in zip(sums, totals, strict=False)]


def _support_tma(pairs: Sequence[Pair]) -> bool:
    # The kernel builds its descriptors with the strides as they are, also that of a single row.
    tensors = [t for pair in pairs for t in pair]
    return all(tma.supports_tma(t) and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def _launch(
    pairs: Sequence[Pair],
    segments: Segments,
    memories: int,
    dtype: torch.dtype,
    totals: Sequence[Tensor | None] = (None,),
    *,
    together: bool = False,
    splits: int = 0,
    slots: int = 0,
) -> list[Tensor]:
    """One (R, M, d) for each pair, or with `together` one for both; `totals` (all or none) are added to and are the results.

    With `splits` there is no result for each memory row, but a partial sum for each of so many equal parts of the rows of x, over those
    that read any of M = `slots`.
    """
    (left, right), (other_left, other_right) = pairs[0], pairs[-1]
    columns, width = left.shape[1], right.shape[1]
    results = splits or memories
    count = 1 if together else len(pairs)
    adds = totals[0] is not None
    assert not adds or splits or segments.lengths is None, "slots past a length are set to zero"
    outs = [
        t if t is not None else torch.empty(results, columns, width, dtype=dtype, device=right.device)
        for t in (totals if adds else (None,) * count)
    ]
    aligned = _support_tma(pairs)
    use_tma = aligned and launch.has_tma(right.device)
    precision = launch.precision(right.dtype)
    tile = backward_tiles.dmemory_tile(
        launch.chip(right.device), right.dtype, precision, width=width, descriptors=aligned, together=together
    )
    tiles = launch.programs(columns, tile.block_n) * launch.programs(width, tile.columns)

    def run() -> None:
        # Descriptors built on the device need room there, for the length of the launch.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=right.device))
        dmemory_bwd_kernel[(count * results * tiles,)](
            left, right, outs[0], other_left, other_right, outs[-1],
            segments.cu_seqlens, segments.index, segments.lengths,
            left.stride(0), right.stride(0), other_left.stride(0), other_right.stride(0),
            segments.rows, segments.length or 0, segments.sequences, memories, slots, results, launch.programs(segments.rows, results),
            M=columns, d=width, BLOCK_M=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, SCAN=_SCAN,
            DENSE=splits > 0, TOGETHER=together, ADDS=adds, LOAD=(TMA if use_tma else POINTER).value, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages, **pdl_options(right.device),
        )  # fmt: skip

    with launch.on_device(right):
        # In a context of its own, so that the allocator is nobody else's.
        contextvars.copy_context().run(run)
    return outs


@triton.jit(do_not_specialize=["N", "T", "S", "R", "slots", "results", "split_rows"])
def dmemory_bwd_kernel(
    left, right, out, other_left, other_right, other_out, cu_seqlens, index, lengths,
    stride_left_n, stride_right_n, stride_other_left_n, stride_other_right_n,
    N, T, S, R, slots, results, split_rows, M: tl.constexpr, d: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, DENSE: tl.constexpr,
    TOGETHER: tl.constexpr, ADDS: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile (BLOCK_M, BLOCK_D) of one of the results; the second pair's programs come after the first's.

    A result is one memory row's gradient; with DENSE the sum over one part of the rows. With TOGETHER there is one of each for both
    pairs. With ADDS it is added to what is there.
    """
    pdl_wait(PDL)
    SLOT_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (d + BLOCK_D - 1) // BLOCK_D
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    # Tiles of one block of columns side by side: they share x's columns in L2.
    slot = tl.program_id(0) % SLOT_TILES * BLOCK_M
    column = tl.program_id(0) // SLOT_TILES % COLUMN_TILES * BLOCK_D
    result = tl.program_id(0) // (SLOT_TILES * COLUMN_TILES)
    if result >= results:
        # Which of the two products a program works on is a choice between pointers, not between loops.
        result = result - results
        left = other_left
        right = other_right
        out = other_out
        stride_left_n = stride_other_left_n
        stride_right_n = stride_other_right_n

    o_slot = slot + tl.arange(0, BLOCK_M)
    o_column = column + tl.arange(0, BLOCK_D)
    inside = (o_slot[:, None] < M) & (o_column[None, :] < d)
    o_out = (tl.cast(result, tl.int64) * M + o_slot.to(tl.int64)[:, None]) * d + o_column[None, :]
    if ADDS:
        # Read before the loop, as what it adds to: after it there would be two tiles in registers, which spilled on sm_90.
        acc = tl.load(out + o_out, mask=inside, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc = _add_readers(
        acc, left, stride_left_n, right, stride_right_n, result, slot, column, segments, slots, split_rows, M, d, BLOCK_M, BLOCK_D, BLOCK_K, SCAN, DENSE, LOAD, PRECISION
    )  # fmt: skip
    if TOGETHER:
        acc = _add_readers(
            acc, other_left, stride_other_left_n, other_right, stride_other_right_n, result, slot, column, segments, slots, split_rows,
            M, d, BLOCK_M, BLOCK_D, BLOCK_K, SCAN, DENSE, LOAD, PRECISION,
        )  # fmt: skip

    if lengths is not None and not DENSE:
        # Left is zero there, but 0 · NaN would not be.
        acc = tl.where(o_slot[:, None] < valid_slots(result, lengths, M), acc, 0.0)
    tl.store(out + o_out, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_readers(
    acc, left, stride_left_n, right, stride_right_n, result, slot, column, segments, slots, split_rows, M: tl.constexpr, d: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, SCAN: tl.constexpr, DENSE: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + leftᵀ right over the rows that read memory row `result`, or with DENSE over those of split `result` that read any, in order.

    Rows that read none are skipped: their left is zero, but 0 · NaN of a text-only row would not be.
    """
    cu_seqlens, index, lengths, N, T, S, R = segments
    low = 0
    high = N
    if DENSE:
        low = tl.minimum(result * split_rows, N)
        high = tl.minimum(low + split_rows, N)
    if index is None and (lengths is None or not DENSE):
        # One range: the sequence itself, or all of them.
        first, end = sequence_bounds(0 if DENSE else result, segments)
        if DENSE:
            _, end = sequence_bounds(S - 1, segments)
        acc = _add_rows(
            acc, left, stride_left_n, right, stride_right_n, tl.maximum(first, low), tl.minimum(end, high), slot, column, M, d, BLOCK_M, BLOCK_D, BLOCK_K, LOAD, PRECISION
        )  # fmt: skip
    else:
        begin = 0
        stop = S
        if DENSE:
            begin = tl.maximum(sequence_of_row(low, segments), 0)
            stop = tl.minimum(sequence_of_row(high - 1, segments) + 1, S)
        for start in tl.range(begin, stop, SCAN):
            o_sequence = start + tl.arange(0, SCAN)
            read = memory_row(o_sequence, segments)
            reads = valid_slots(read, lengths, slots) > 0 if DENSE else read == result
            beyond = start + SCAN
            sequence = tl.min(tl.where(reads, o_sequence, beyond))
            # Neighbours that read the same memory row make one range of rows.
            while sequence < beyond:
                after = tl.min(tl.where(reads | (o_sequence < sequence), beyond, o_sequence))
                first, _ = sequence_bounds(sequence, segments)
                _, end = sequence_bounds(after - 1, segments)
                acc = _add_rows(
                    acc, left, stride_left_n, right, stride_right_n, tl.maximum(first, low), tl.minimum(end, high), slot, column, M, d, BLOCK_M, BLOCK_D, BLOCK_K, LOAD, PRECISION
                )  # fmt: skip
                sequence = tl.min(tl.where(reads & (o_sequence >= after), o_sequence, beyond))
    return acc


@triton.jit
def _add_rows(
    acc, left, stride_left_n, right, stride_right_n, first, end, slot, column, M: tl.constexpr, d: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + leftᵀ right over rows [first, end); TMA fills a ragged tail with zeros, since its descriptor ends where the range does."""
    if LOAD == TMA:
        left = tl.make_tensor_descriptor(left, [end, M], [tl.cast(stride_left_n, tl.int64), 1], [BLOCK_K, BLOCK_M])
        right = tl.make_tensor_descriptor(right, [end, d], [tl.cast(stride_right_n, tl.int64), 1], [BLOCK_K, BLOCK_D])
    for k in tl.range(first, end, BLOCK_K):
        b_left = load_tile(left, k, slot, end, M, stride_left_n, 1, BLOCK_K, BLOCK_M, LOAD, False, M % BLOCK_M == 0)
        b_right = load_tile(
            right, k, column, end, d, stride_right_n, 1, BLOCK_K, BLOCK_D, LOAD, False, d % BLOCK_D == 0
        )
        acc = tl.dot(b_left.T, b_right, acc, input_precision=PRECISION)
    return acc
