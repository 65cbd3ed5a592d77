"""dx = dG·G + dU·K + dS·Kv, stored once: three K loops, one after the other, into one accumulator.

The output kernel with a second dense product in front; two products interleaved in one loop would double the shared memory. With a
factored memory the last loop is dense, [dS A | dS] against [W; p^k]. Few tiles take split-K, as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import POINTER, TMA, swizzle
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.kernels.output import add_memory, add_product
from memvp_kernels.backends.triton.kernels.split_k import empty_splits, reduce_splits
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.launch import strides
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["dinput_backward", "dinput_bwd_kernel"]


def dinput_backward(
    dpre: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    dscores: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    like: Tensor,
) -> Tensor:
    """Launch the kernel.

    Args:
        dpre: (P, N, F) contiguous, [gate's, key's] or [key's], with key and gate (F, d), any strides; or None and no weights.
        dscores: (N, M) with memory (R, M, d) in x's dtype, both zero past the valid slots; or both None.
        like: x, for the result's dtype and device.

    Returns:
        dx (N, d), contiguous.
    """
    rows, width = like.shape
    pairs = 0 if key is None else key.shape[0]
    slots = 0 if memory is None else memory.shape[1]
    dx = torch.empty(rows, width, dtype=like.dtype, device=like.device)
    dkey = dpre[-1] if dpre is not None else None
    dgate = dpre[0] if dpre is not None and gate is not None else None

    lefts = [t for t in (dkey, dgate, dscores, memory) if t is not None]
    weights = [t for t in (key, gate) if t is not None]
    aligned = all(tma.supports_tma(t) for t in lefts) and all(tma.load_mode(t) != POINTER.value for t in weights)
    use_tma = aligned and launch.has_tma(like.device)
    both = pairs * (1 + (gate is not None))
    shape = launch.shape_of(like, both, slots, segments, descriptors=aligned)
    tile = backward_tiles.dinput_tile(launch.chip(like.device), shape)
    load = TMA.value if use_tma else POINTER.value
    load_key = tma.load_mode(key, use_tma)
    load_gate = tma.load_mode(gate, use_tma)
    left, right = (tile.block_n, tile.block_k), (tile.block_k, tile.columns)

    partials = empty_splits(tile.splits, dx)
    grid = (launch.programs(rows, tile.block_n) * launch.programs(width, tile.columns), tile.splits)
    with launch.on_device(like):
        dinput_bwd_kernel[grid](
            tma.make_descriptor(dgate, left, load),
            tma.make_descriptor(gate, right, load_gate),
            tma.make_descriptor(dkey, left, load),
            tma.make_descriptor(key, right, load_key),
            tma.make_descriptor(dscores, left, load),
            tma.make_descriptor(memory, (1, *right), load),
            dx if partials is None else partials, segments.cu_seqlens, segments.index, segments.lengths,
            *strides(gate, 2), *strides(key, 2), *strides(dscores, 1), *strides(memory, 3),
            rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
            STRADDLES=memory is not None and tiles.straddles(segments.sequences, segments.length, tile.block_n),
            SPLITS=tile.splits, LOAD=load, LOAD_GATE=load_gate, LOAD_KEY=load_key, PRECISION=shape.precision,
            DTYPE=launch.element_type(like.dtype if partials is None else partials.dtype), num_warps=tile.warps, num_stages=tile.stages, **pdl_options(like.device),
        )  # fmt: skip
    return dx if partials is None else reduce_splits(partials, None, None, dx)


@triton.jit(do_not_specialize=["N", "T", "S", "R"])
def dinput_bwd_kernel(
    dgate, gate, dkey, key, dscores, memory, dx, cu_seqlens, index, lengths,
    stride_gate_f, stride_gate_d, stride_key_f, stride_key_d, stride_dscores_n, stride_memory_r, stride_memory_m, stride_memory_d,
    N, T, S, R, F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STRADDLES: tl.constexpr,
    SPLITS: tl.constexpr, LOAD: tl.constexpr, LOAD_GATE: tl.constexpr, LOAD_KEY: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles (BLOCK_N, BLOCK_D) of dx, SPLITS); with SPLITS > 1 dx is (SPLITS, N, d), one partial sum each."""
    pdl_wait(PDL)
    row_tile, column_tile = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(d, BLOCK_D), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_D
    split = 0
    if SPLITS > 1:
        split = tl.program_id(1)
        dx += split.to(tl.int64) * N * d

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    pre_strides = (F, 1)
    if gate is not None:
        gate_strides = (stride_gate_f, stride_gate_d)
        acc = add_product(
            acc, dgate, pre_strides, gate, gate_strides, row, column, split, N, F, d, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, LOAD, LOAD_GATE, PRECISION
        )  # fmt: skip
    if key is not None:
        key_strides = (stride_key_f, stride_key_d)
        acc = add_product(
            acc, dkey, pre_strides, key, key_strides, row, column, split, N, F, d, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, LOAD, LOAD_KEY, PRECISION
        )  # fmt: skip
    if memory is not None:
        scores_strides, memory_strides = (stride_dscores_n, 1), (stride_memory_r, stride_memory_m, stride_memory_d)
        segments = (cu_seqlens, index, lengths, N, T, S, R)
        acc = add_memory(
            acc, dscores, scores_strides, memory, memory_strides, row, column, split, segments, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, STRADDLES, LOAD, PRECISION
        )  # fmt: skip

    o_row = row + tl.arange(0, BLOCK_N)
    o_column = column + tl.arange(0, BLOCK_D)
    inside = (o_row[:, None] < N) & (o_column[None, :] < d)
    tl.store(dx + o_row.to(tl.int64)[:, None] * d + o_column[None, :], acc.to(DTYPE), mask=inside)
