"""dx = dG·G + dU·K + dS·Kv, stored once: three sequential K loops into one accumulator.

The output kernel with a second dense product in front; two products interleaved in one loop would double the shared memory. With a
factored memory the last loop is dense: [dS A | dS] against [W; p^k], one sequence wide. Few tiles are cut into parts, as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.operands import BY_POINTER, BY_ROW, swizzle
from memvp_kernels.backends.triton.device.pdl import chained, follow
from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.kernels.output import add_memory, add_product
from memvp_kernels.backends.triton.kernels.split_k import add_parts, empty_parts
from memvp_kernels.backends.triton.runtime import launch
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
    aligned = all(launch.describable(t) for t in lefts) and all(launch.form_of(t) != BY_POINTER.value for t in weights)
    tma = aligned and launch.has_tma(like.device)
    both = pairs * (1 + (gate is not None))
    shape = launch.shape_of(like, both, slots, segments, descriptors=aligned)
    tile = backward_tiles.dinput_tile(launch.chip(like.device), shape)
    form = BY_ROW.value if tma else BY_POINTER.value
    form_key = launch.form_of(key, tma) if key is not None else BY_POINTER.value
    form_gate = launch.form_of(gate, tma) if gate is not None else BY_POINTER.value
    left, right = (tile.block_n, tile.block_k), (tile.block_k, tile.columns)

    parts = empty_parts(tile.splits, dx)
    grid = (launch.programs(rows, tile.block_n) * launch.programs(width, tile.columns), tile.splits)
    with launch.on_device(like):
        dinput_bwd_kernel[grid](
            launch.describe(dgate, left, form) if dgate is not None else None,
            launch.describe(gate, right, form_gate) if gate is not None else None,
            launch.describe(dkey, left, form) if dkey is not None else None,
            launch.describe(key, right, form_key) if key is not None else None,
            launch.describe(dscores, left, form) if dscores is not None else None,
            launch.describe(memory, (1, *right), form) if memory is not None else None,
            dx if parts is None else parts, segments.cu_seqlens, segments.index, segments.lengths,
            *_strides(gate, 2), *_strides(key, 2), *_strides(dscores, 1), *_strides(memory, 3),
            rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
            STRADDLES=memory is not None and tiles.straddles(segments.sequences, segments.length, tile.block_n),
            SPLITS=tile.splits, FORM=form, FORM_GATE=form_gate, FORM_KEY=form_key, PRECISION=shape.precision,
            DTYPE=launch.element_type(like.dtype if parts is None else parts.dtype), num_warps=tile.warps, num_stages=tile.stages, **chained(like.device),
        )  # fmt: skip
    return dx if parts is None else add_parts(parts, None, None, dx)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return tensor.stride()[:count] if tensor is not None else (0,) * count


@triton.jit(do_not_specialize=["N", "T", "S", "R"])
def dinput_bwd_kernel(
    dgate, gate, dkey, key, dscores, memory, dx, cu_seqlens, index, lengths,
    stride_gate_f, stride_gate_d, stride_key_f, stride_key_d, stride_dscores_n, stride_memory_r, stride_memory_m, stride_memory_d,
    N, T, S, R, F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STRADDLES: tl.constexpr,
    SPLITS: tl.constexpr, FORM: tl.constexpr, FORM_GATE: tl.constexpr, FORM_KEY: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles (BLOCK_N, BLOCK_D) of dx, SPLITS); with SPLITS > 1 dx is (SPLITS, N, d), a part each."""
    follow(CHAINED)
    row_tile, column_tile = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(d, BLOCK_D), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_D
    part = 0
    if SPLITS > 1:
        part = tl.program_id(1)
        dx += part.to(tl.int64) * N * d

    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if gate is not None:
        acc = add_product(
            acc, dgate, gate, row, column, part, F, 1, stride_gate_f, stride_gate_d, N, F, d,
            BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, FORM, FORM_GATE, PRECISION,
        )  # fmt: skip
    if key is not None:
        acc = add_product(
            acc, dkey, key, row, column, part, F, 1, stride_key_f, stride_key_d, N, F, d,
            BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, FORM, FORM_KEY, PRECISION,
        )  # fmt: skip
    if memory is not None:
        acc = add_memory(
            acc, row, column, part, dscores, memory, cu_seqlens, index, lengths, stride_dscores_n, 1, stride_memory_r, stride_memory_m,
            stride_memory_d, N, T, S, R, d, M, BLOCK_N, BLOCK_D, BLOCK_K, SPLITS, STRADDLES, FORM, PRECISION,
        )  # fmt: skip

    o_row = row + tl.arange(0, BLOCK_N)
    o_column = column + tl.arange(0, BLOCK_D)
    inside = (o_row[:, None] < N) & (o_column[None, :] < d)
    tl.store(dx + o_row.to(tl.int64)[:, None] * d + o_column[None, :], acc.to(DTYPE), mask=inside)
