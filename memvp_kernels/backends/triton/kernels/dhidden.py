"""dHidden = dy Vᵀ with the activation's derivative in the epilogue, and in the same launch dVisual = dy Vvᵀ of every sequence with its own.

The backward of the hidden kernel, with the same order of tiles. dHidden itself is never stored, only the gradients of the pre-activations.
With a factored memory the tiles over slots, one sequence wide, are the columns dy [W; p^v]ᵀ, which the core kernel finishes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate_derivative
from memvp_kernels.backends.triton.device.dropout import keep_mask
from memvp_kernels.backends.triton.device.operands import (
    POINTER,
    TMA,
    load_memory_tile,
    load_tile,
    swizzle,
    tile_pointers,
)
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.heuristics import backward_tiles
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.launch import strides
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["HiddenGradients", "dhidden_backward", "dhidden_bwd_kernel", "memory_backward", "store_visual_gradient"]

_SUBTILE = (
    64  # columns of 16-bit numbers loaded in vectors; a quarter for float32, half for what is loaded element by element
)


class HiddenGradients(NamedTuple):
    """Results of one launch in x's dtype, None where not asked for.

    Attributes:
        dpre: (P, N, F), gradients of the pre-activations.
        dscores: (N, M), gradient of the scores, zero where a row sees no slot.
        visual: (N, M), the visual activations, recomputed.
        columns: (N, M), dy times the memory as it is.
    """

    dpre: Tensor | None
    dscores: Tensor | None
    visual: Tensor | None
    columns: Tensor | None


def dhidden_backward(
    grad: Tensor,
    value: Tensor | None,
    pre: Tensor | None,
    activation: str,
    memory: Tensor | None,
    memories: int,
    scores: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    need_visual: bool,
    overwrite: bool,
) -> HiddenGradients:
    """Launch the kernel.

    Args:
        grad: dy (N, d), rows contiguous.
        value: (F, d), any strides, with pre (P, N, F), contiguous; or both None: only the memory's tiles.
        memory: Vv (R, M, d) in dy's dtype; None: no dscores.
        memories: R.
        scores: (N, M), rows contiguous; None: dy memoryᵀ itself is wanted, as `columns`.
        visual: what became of a score in the forward; None without scores.
        need_visual: recompute the visual activations, which the gradient of Vv needs.
        overwrite: pre belongs to nobody else, so dpre may take its place; a program reads of it only what it then writes.
    """
    rows, width = grad.shape
    pairs = 0 if value is None else value.shape[0]
    slots = scores.shape[1] if scores is not None else memory.shape[1] if memory is not None else 0
    raw = memory is not None and scores is None
    # No tile covers the rows of packed x outside every sequence.
    outside = segments.cu_seqlens is not None
    out = HiddenGradients(
        dpre=pre if pre is None or overwrite else torch.empty_like(pre),
        dscores=launch.empty_rows(rows, slots, grad, zero=outside) if memory is not None and not raw else None,
        visual=launch.empty_rows(rows, slots, grad, zero=outside) if need_visual and scores is not None else None,
        columns=launch.empty_rows(rows, slots, grad) if raw else None,
    )

    operands = [t for t in (grad, memory) if t is not None]
    aligned = all(tma.supports_tma(t) for t in operands)
    aligned = aligned and (value is None or tma.load_mode(value) != POINTER.value)
    use_tma = aligned and launch.has_tma(grad.device)
    shape = launch.shape_of(grad, pairs, slots, segments, descriptors=aligned)
    tile = backward_tiles.dhidden_tile(launch.chip(grad.device), shape)
    load = TMA.value if use_tma else POINTER.value
    load_value = tma.load_mode(value, use_tma)
    block_m = min(tile.columns, 2 * _SUBTILE)
    subtile = (_SUBTILE if grad.element_size() == 2 else _SUBTILE // 4) // (1 if aligned else 2)

    row_tiles = launch.programs(rows, tile.block_n)
    ffn_tiles = row_tiles * launch.programs(pairs, tile.columns)
    memory_tiles = (row_tiles + segments.sequences) * launch.programs(slots, block_m)
    with launch.on_device(grad):
        dhidden_bwd_kernel[(ffn_tiles + memory_tiles,)](
            tma.make_descriptor(grad, (tile.block_n, tile.block_k), load),
            tma.make_descriptor(value, (tile.columns, tile.block_k), load_value),
            pre, out.dpre,
            tma.make_descriptor(memory, (1, block_m, tile.block_k), load),
            scores, out.dscores, out.visual, out.columns, visual.seed if visual is not None else None, visual.theta if visual is not None else None,
            segments.cu_seqlens, segments.index, segments.lengths,
            grad.stride(0), *strides(value, 2), *strides(memory, 3), *strides(scores, 1), *strides(out.dscores, 1),
            *strides(out.visual, 1), *strides(out.columns, 1),
            rows, segments.length or 0, segments.sequences, memories,
            visual.scale if visual is not None else 1.0, visual.threshold if visual is not None else 0,
            GATED=pre is not None and pre.shape[0] == 2, F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_F=tile.columns,
            BLOCK_M=block_m, BLOCK_K=tile.block_k, SUBTILE=subtile, GROUP=tile.group, ACTIVATION=activation,
            VISUAL_ACTIVATION=visual.activation if visual is not None else "identity", LOAD=load, LOAD_VALUE=load_value,
            PRECISION=shape.precision, DTYPE=launch.element_type(grad.dtype), num_warps=tile.warps, num_stages=tile.stages, **pdl_options(grad.device),
        )  # fmt: skip
    return out


def memory_backward(
    grad: Tensor,
    activation: str,
    memory: Tensor | None,
    memories: int,
    scores: Tensor,
    segments: Segments,
    visual: Visual | None,
    *,
    need_visual: bool,
) -> HiddenGradients:
    """The memory's tiles alone, where the FFN is computed elsewhere; arguments as `dhidden_backward`."""
    return dhidden_backward(
        grad, None, None, activation, memory, memories, scores, segments, visual, need_visual=need_visual, overwrite=False
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "T", "S", "R", "threshold"])
def dhidden_bwd_kernel(
    grad, value, pre, dpre, memory, scores, dscores, visual, columns, seed, theta, cu_seqlens, index, lengths,
    stride_grad_n, stride_value_f, stride_value_d, stride_memory_r, stride_memory_m, stride_memory_d,
    stride_scores_n, stride_dscores_n, stride_visual_n, stride_columns_n,
    N, T, S, R, scale, threshold, GATED: tl.constexpr, F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SUBTILE: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr,
    LOAD: tl.constexpr, LOAD_VALUE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile: first cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the memory's."""
    pdl_wait(PDL)
    value_strides, memory_strides = (
        (stride_value_f, stride_value_d),
        (stride_memory_r, stride_memory_m, stride_memory_d),
    )
    visual_pass = (
        scores,
        dscores,
        visual,
        seed,
        theta,
        stride_scores_n,
        stride_dscores_n,
        stride_visual_n,
        scale,
        threshold,
    )
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    row_tiles = tl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0)
    if memory is None and scores is None:
        _ffn_tile(
            tile, row_tiles, grad, stride_grad_n, value, value_strides, pre, dpre, N, GATED, F, d,
            BLOCK_N, BLOCK_F, BLOCK_K, SUBTILE, GROUP, ACTIVATION, LOAD, LOAD_VALUE, PRECISION, DTYPE,
        )  # fmt: skip
    elif value is None:
        _memory_tile(
            tile, row_tiles, grad, stride_grad_n, memory, memory_strides, visual_pass, columns, stride_columns_n, segments,
            d, M, BLOCK_N, BLOCK_M, BLOCK_K, SUBTILE, VISUAL_ACTIVATION, LOAD, PRECISION, DTYPE,
        )  # fmt: skip
    else:
        if tile < ffn_tiles:
            _ffn_tile(
                tile, row_tiles, grad, stride_grad_n, value, value_strides, pre, dpre, N, GATED, F, d,
                BLOCK_N, BLOCK_F, BLOCK_K, SUBTILE, GROUP, ACTIVATION, LOAD, LOAD_VALUE, PRECISION, DTYPE,
            )  # fmt: skip
        else:
            _memory_tile(
                tile - ffn_tiles, row_tiles, grad, stride_grad_n, memory, memory_strides, visual_pass, columns, stride_columns_n, segments,
                d, M, BLOCK_N, BLOCK_M, BLOCK_K, SUBTILE, VISUAL_ACTIVATION, LOAD, PRECISION, DTYPE,
            )  # fmt: skip


@triton.jit
def _ffn_tile(
    tile, row_tiles, grad, stride_grad_n, value, value_strides, pre, dpre, N, GATED: tl.constexpr,
    F: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILE: tl.constexpr,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, LOAD: tl.constexpr, LOAD_VALUE: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    EVEN_K: tl.constexpr = d % BLOCK_K == 0
    stride_value_f, stride_value_d = value_strides
    row_tile, column_tile = swizzle(tile, row_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_F
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for k in tl.range(0, d, BLOCK_K):
        b_grad = load_tile(grad, row, k, N, d, stride_grad_n, 1, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
        b_value = load_tile(
            value, column, k, F, d, stride_value_f, stride_value_d, BLOCK_F, BLOCK_K, LOAD_VALUE, F % BLOCK_F == 0, EVEN_K
        )  # fmt: skip
        acc = tl.dot(b_grad, b_value.T, acc, input_precision=PRECISION)
    subtiles = _column_subtiles(acc, SUBTILE)
    for i in tl.static_range(len(subtiles)):
        _store_dpre(subtiles[i], pre, dpre, row, column + i * subtiles[i].shape[1], N, F, GATED, ACTIVATION, DTYPE)


@triton.jit
def _memory_tile(
    tile, row_tiles, grad, stride_grad_n, memory, memory_strides, visual_pass, columns, stride_columns_n, segments,
    d: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILE: tl.constexpr,
    VISUAL_ACTIVATION: tl.constexpr, LOAD: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    EVEN_K: tl.constexpr = d % BLOCK_K == 0
    cu_seqlens, index, lengths, N, T, S, R = segments
    pairs = row_tiles + S
    row_tile, sequence = tile_sequence(tile % pairs, segments, BLOCK_N)
    slot = (tile // pairs) * BLOCK_M
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, segments)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, segments)
        slots = valid_slots(read, lengths, M)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if memory is not None:  # noqa: SIM102 - known at compile time
            if slot < slots:
                for k in tl.range(0, d, BLOCK_K):
                    b_grad = load_tile(grad, row, k, N, d, stride_grad_n, 1, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
                    b_memory = load_memory_tile(
                        memory, read, slot, k, M, d, memory_strides, BLOCK_M, BLOCK_K, LOAD, EVEN_K
                    )
                    acc = tl.dot(b_grad, b_memory.T, acc, input_precision=PRECISION)
        if columns is not None:
            o_row = row + tl.arange(0, BLOCK_N)
            o_slot = slot + tl.arange(0, BLOCK_M)
            inside = (o_row[:, None] < N) & (o_slot[None, :] < M)
            pointers = columns + o_row.to(tl.int64)[:, None] * stride_columns_n + o_slot[None, :]
            tl.store(pointers, acc.to(DTYPE), mask=inside)
        else:
            subtiles = _column_subtiles(acc, SUBTILE)
            for i in tl.static_range(len(subtiles)):
                store_visual_gradient(
                    subtiles[i], visual_pass, row, slot + i * subtiles[i].shape[1], first, end, slots, True, M, VISUAL_ACTIVATION, DTYPE
                )  # fmt: skip


@triton.jit
def _column_subtiles(block, WIDTH: tl.constexpr):
    """The block as subtiles of at most WIDTH columns, left to right.

    A thread holds columns of every subtile, so this moves no data. An epilogue that reads other tensors after the K loop spills on a
    whole 128 x 256 tile; on 64 columns at a time it does not.
    """
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    if COLUMNS <= WIDTH:
        return (block,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(block, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        return _column_subtiles(left, WIDTH) + _column_subtiles(right, WIDTH)


@triton.jit
def _store_dpre(
    b_dhidden, pre, dpre, row, column, N, F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    ROWS: tl.constexpr = b_dhidden.shape[0]
    COLUMNS: tl.constexpr = b_dhidden.shape[1]
    inside = (row + tl.arange(0, ROWS)[:, None] < N) & (column + tl.arange(0, COLUMNS)[None, :] < F)
    o_first = tile_pointers(pre, row, column, F, ROWS, COLUMNS)
    o_dfirst = tile_pointers(dpre, row, column, F, ROWS, COLUMNS)
    b_active, b_slope = activate_derivative(tl.load(o_first, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        second = tl.cast(N, tl.int64) * F
        b_key = tl.load(o_first + second, mask=inside, other=0.0).to(tl.float32)
        tl.store(o_dfirst, (b_dhidden * b_key * b_slope).to(DTYPE), mask=inside)
        tl.store(o_dfirst + second, (b_dhidden * b_active).to(DTYPE), mask=inside)
    else:
        tl.store(o_dfirst, (b_dhidden * b_slope).to(DTYPE), mask=inside)


@triton.jit
def store_visual_gradient(
    b_dvisual, visual_pass, row, slot, first, end, slots, store, M: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """From dvisual of a block of slots, dscores and visual of rows [first, end), in DTYPE; both 0 from slot `slots` on.

    Args:
        visual_pass: (scores, dscores, visual, seed, theta, three strides of the rows, scale, threshold); dscores and visual are stored where
            they are not None and `store` is true.
    """
    scores, dscores, visual, seed, theta, stride_scores_n, stride_dscores_n, stride_visual_n, scale, threshold = (
        visual_pass
    )
    ROWS: tl.constexpr = b_dvisual.shape[0]
    SLOTS: tl.constexpr = b_dvisual.shape[1]
    o_row = row + tl.arange(0, ROWS)
    o_slot = slot + tl.arange(0, SLOTS)
    inside = (o_row[:, None] >= first) & (o_row[:, None] < end) & (o_slot[None, :] < M)
    # Masked by M, which is known at compile time, not by `slots`: the load stays a wide one.
    o_scores = tile_pointers(scores, row, slot, stride_scores_n, ROWS, SLOTS)
    b_scores = tl.load(o_scores, mask=inside, other=0.0).to(tl.float32)
    b_active, b_slope = activate_derivative(b_scores, VISUAL_ACTIVATION)
    valid = o_slot[None, :] < slots
    scale = tl.cast(scale, tl.float32)
    if seed is not None:
        # A product, as in PyTorch: a dropped NaN stays one.
        scale = scale * keep_mask(seed, threshold, row, slot, ROWS, SLOTS).to(tl.float32)
    if theta is not None:
        b_theta = tl.load(theta + o_row, mask=(o_row >= first) & (o_row < end), other=0.0)
        scale = scale * (b_scores >= b_theta[:, None]).to(tl.float32)
    b_visual = tl.where(valid, b_active * scale, 0.0).to(DTYPE)
    b_dscores = tl.where(valid, b_dvisual * scale * b_slope, 0.0).to(DTYPE)
    if visual is not None:
        tl.store(tile_pointers(visual, row, slot, stride_visual_n, ROWS, SLOTS), b_visual, mask=inside & store)
    if dscores is not None:
        tl.store(tile_pointers(dscores, row, slot, stride_dscores_n, ROWS, SLOTS), b_dscores, mask=inside & store)
    return b_dscores, b_visual
