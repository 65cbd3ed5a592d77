"""The hidden kernel: act(x Gᵀ + b_G) ⊙ (x Kᵀ + b_K), and in the same launch x Kvᵀ of every sequence with its own activation.

Tiles over F come first, then tiles over the slots of each (row tile, sequence) that meet; a memory tile has the shape of an FFN tile and
costs as much. Gate and up share a tile, so that the activation happens in the epilogue: in one wide accumulator where one
descriptor can span both weights, in two otherwise. With a factored memory the same tiles over slots, one sequence wide and
without an activation, are the shared extra columns x [W; p^k]ᵀ.

Without visual tiles, hidden and the pre-activations leave by descriptor through shared memory, asynchronously; then, where tiles are more
than one wave, a program may own several and start the next one's loads while the last one's stores are under way (`tiles.persists`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate
from memvp_kernels.backends.triton.device.operands import (
    BY_PAIR,
    BY_POINTER,
    BY_ROW,
    load_memory_tile,
    load_tile,
    swizzle,
    tile_pointers,
)
from memvp_kernels.backends.triton.device.pdl import chained, follow
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual, store_visual_pieces
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.runtime import launch
from memvp_kernels.problem import Segments

__all__ = ["Products", "hidden_forward", "hidden_fwd_kernel", "memory_forward"]

STORED_COLUMNS = tl.constexpr(tiles.STORED_COLUMNS)


@dataclass(frozen=True)
class Products:
    """What one launch made: hidden (N, F), pre (P, N, F), visual (N, M), scores (N, M), all in x's dtype, None where not asked for."""

    hidden: Tensor | None
    pre: Tensor | None
    visual: Tensor | None
    scores: Tensor | None


def hidden_forward(
    x: Tensor,
    key: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    memory: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    save_hidden: bool,
    save_scores: bool,
    need_hidden: bool = True,
) -> Products:
    """Launch the hidden kernel.

    Args:
        x: (N, d), any strides.
        key, gate: (F, d), any strides; key None: only the memory's tiles.
        key_bias, gate_bias: (F,) or None, any float dtype.
        memory: (R, M, d) in x's dtype, or None: only the FFN's tiles.
        segments: which rows read which memory row.
        visual: None: the scores themselves are wanted (then `save_scores`), not the visual activations.
        save_hidden: keep the pre-activations, biases included: P = 2, gate's then key's, or P = 1.
        save_scores: keep x Kvᵀ.
        need_hidden: False where the backward forms the pre-activations again: hidden itself is not stored.
    """
    rows, width = x.shape
    pairs = 0 if key is None else key.shape[0]
    slots = 0 if memory is None else memory.shape[1]
    gated = gate is not None
    made = Products(
        hidden=launch.empty_rows(rows, pairs, x) if key is not None and need_hidden else None,
        pre=x.new_empty(1 + gated, rows, pairs) if save_hidden and key is not None else None,
        visual=launch.empty_rows(rows, slots, x) if memory is not None and visual is not None else None,
        scores=_scores(rows, slots, x, segments) if memory is not None and save_scores else None,
    )

    forms = [BY_ROW.value if w is None else launch.form_of(w) for w in (key, gate)]
    aligned = launch.describable(x) and (memory is None or launch.describable(memory)) and BY_POINTER.value not in forms
    tma = aligned and launch.has_tma(x.device)
    form_key, form_gate = forms if tma else (BY_POINTER.value, BY_POINTER.value)
    paired = tma and gate is not None and key is not None and launch.pairable(gate, key)
    shape = launch.shape_of(x, pairs, slots, segments, gated=gated, descriptors=aligned)
    chip = launch.chip(x.device)
    tile = tiles.hidden_tile(chip, shape)
    wide = (1 + paired) * tile.columns  # of one accumulator
    block_weight, block_memory = (tile.columns, tile.block_k), (1, wide, tile.block_k)

    gate_first = 0
    key_operand: object
    gate_operand: object
    if paired:
        assert gate is not None and key is not None
        form_key = form_gate = BY_PAIR.value
        gate_first = int(gate.data_ptr() < key.data_ptr())
        key_operand = gate_operand = launch.describe_pair(gate, key, block_weight)
    else:
        key_operand = launch.describe(key, block_weight, form_key) if key is not None else None
        gate_operand = launch.describe(gate, block_weight, form_gate) if gate is not None else None
    form = BY_ROW.value if tma else BY_POINTER.value

    row_tiles = launch.programs(rows, tile.block_n)
    ffn_tiles = row_tiles * launch.programs(pairs, tile.columns)
    memory_tiles = (row_tiles + segments.sequences) * launch.programs(slots, wide)
    programs = ffn_tiles + memory_tiles
    # Beside visual tiles, with dropout and an activation of their own, the registers are full without either.
    kept = [t for t in (made.hidden, made.pre) if t is not None]
    stored = tma and visual is None and x.dtype != torch.float32 and all(launch.describable(t) for t in kept)
    form_store = (BY_ROW if stored else BY_POINTER).value
    block_store = (tile.block_n, min(tile.columns, tiles.STORED_COLUMNS))
    accumulated = tile.columns * (1 + gated)
    persistent = stored and tiles.persists(chip, tile, x.dtype, accumulated, programs)
    with launch.on_device(x):
        hidden_fwd_kernel[(min(programs, chip.multiprocessors) if persistent else programs,)](
            launch.describe(x, (tile.block_n, tile.block_k), form), gate_operand, key_operand, gate_bias, key_bias,
            launch.describe(memory, block_memory, form) if memory is not None else None,
            launch.describe(made.hidden, block_store, form_store) if made.hidden is not None else None,
            launch.describe(made.pre, (1, *block_store), form_store) if made.pre is not None else None,
            made.visual, made.scores,
            visual.seed if visual is not None else None, segments.cu_seqlens, segments.index, segments.lengths,
            *x.stride(), *_strides(gate, 2), *_strides(key, 2), *_strides(memory, 3), _stride(gate_bias), _stride(key_bias),
            *_strides(made.hidden, 1), *_strides(made.visual, 1),
            rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0, gate_first,
            visual.scale if visual is not None else 1.0, visual.threshold if visual is not None else 0,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_F=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
            ACTIVATION=activation, VISUAL_ACTIVATION=visual.activation if visual is not None else "none",
            FORM=form, FORM_GATE=form_gate, FORM_KEY=form_key, FORM_STORE=form_store, PERSISTENT=persistent,
            PRECISION=shape.precision, DTYPE=launch.element_type(x.dtype),
            num_warps=tile.warps, num_stages=tile.stages, **chained(x.device),
        )  # fmt: skip
    return made


def memory_forward(
    x: Tensor, activation: str, memory: Tensor, segments: Segments, visual: Visual | None, *, save_scores: bool
) -> Products:
    """The memory's tiles alone, for a road whose FFN is computed elsewhere; arguments as `hidden_forward`."""
    return hidden_forward(
        x, None, None, None, None, activation, memory, segments, visual, save_hidden=False, save_scores=save_scores
    )


def _scores(rows: int, slots: int, x: Tensor, segments: Segments) -> Tensor:
    # Rows of packed x outside every sequence are no tile's business, and their scores are 0.
    return (x.new_zeros if segments.cu_seqlens is not None else x.new_empty)(rows, slots)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return tensor.stride()[:count] if tensor is not None else (0,) * count


def _stride(vector: Tensor | None) -> int:
    return vector.stride(0) if vector is not None else 0


@triton.jit(do_not_specialize=["N", "T", "S", "R", "gate_first", "threshold"])
def hidden_fwd_kernel(
    x, gate, key, gate_bias, key_bias, memory, hidden, pre, visual, scores, seed, cu_seqlens, index, lengths,
    stride_x_n, stride_x_d, stride_gate_f, stride_gate_d, stride_key_f, stride_key_d,
    stride_memory_r, stride_memory_m, stride_memory_d, stride_gate_bias, stride_key_bias, stride_hidden_n, stride_visual_n,
    N, T, S, R, gate_first, scale, threshold,
    F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr,
    FORM: tl.constexpr, FORM_GATE: tl.constexpr, FORM_KEY: tl.constexpr, FORM_STORE: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Tiles: first cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the memory's, which are fewer and end the last wave.

    One program each, or with PERSISTENT every num_programs-th.
    """
    follow(CHAINED)
    if PERSISTENT:
        count = tl.cdiv(N, BLOCK_N) * tl.cdiv(F, BLOCK_F)
        if memory is not None:
            BLOCK_M: tl.constexpr = 2 * BLOCK_F if FORM_KEY == BY_PAIR else BLOCK_F
            count += (tl.cdiv(N, BLOCK_N) + S) * tl.cdiv(M, BLOCK_M)
        for tile in tl.range(tl.program_id(0), count, tl.num_programs(0)):
            _tile(
                tile, x, gate, key, gate_bias, key_bias, memory, hidden, pre, visual, scores, seed, cu_seqlens, index, lengths,
                stride_x_n, stride_x_d, stride_gate_f, stride_gate_d, stride_key_f, stride_key_d, stride_memory_r, stride_memory_m,
                stride_memory_d, stride_gate_bias, stride_key_bias, stride_hidden_n, stride_visual_n, N, T, S, R, gate_first, scale,
                threshold, F, d, M, BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, VISUAL_ACTIVATION, FORM, FORM_GATE, FORM_KEY,
                FORM_STORE, PRECISION, DTYPE,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, gate, key, gate_bias, key_bias, memory, hidden, pre, visual, scores, seed, cu_seqlens, index, lengths,
            stride_x_n, stride_x_d, stride_gate_f, stride_gate_d, stride_key_f, stride_key_d, stride_memory_r, stride_memory_m,
            stride_memory_d, stride_gate_bias, stride_key_bias, stride_hidden_n, stride_visual_n, N, T, S, R, gate_first, scale,
            threshold, F, d, M, BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, VISUAL_ACTIVATION, FORM, FORM_GATE, FORM_KEY,
            FORM_STORE, PRECISION, DTYPE,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, x, gate, key, gate_bias, key_bias, memory, hidden, pre, visual, scores, seed, cu_seqlens, index, lengths,
    stride_x_n, stride_x_d, stride_gate_f, stride_gate_d, stride_key_f, stride_key_d,
    stride_memory_r, stride_memory_m, stride_memory_d, stride_gate_bias, stride_key_bias, stride_hidden_n, stride_visual_n,
    N, T, S, R, gate_first, scale, threshold,
    F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr,
    FORM: tl.constexpr, FORM_GATE: tl.constexpr, FORM_KEY: tl.constexpr, FORM_STORE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # One accumulator's width; a memory tile spans all of it.
    BLOCK_M: tl.constexpr = 2 * BLOCK_F if FORM_KEY == BY_PAIR else BLOCK_F
    row_tiles = tl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * tl.cdiv(F, BLOCK_F)
    if memory is None:
        _ffn_tile(
            tile, row_tiles, x, gate, key, gate_bias, key_bias, hidden, pre, stride_x_n, stride_x_d, stride_gate_f, stride_gate_d,
            stride_key_f, stride_key_d, stride_gate_bias, stride_key_bias, stride_hidden_n, N, gate_first, F, d,
            BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, FORM, FORM_GATE, FORM_KEY, FORM_STORE, PRECISION, DTYPE,
        )  # fmt: skip
    elif key is None:
        _memory_tile(
            tile, row_tiles, x, memory, visual, scores, seed, cu_seqlens, index, lengths, stride_x_n, stride_x_d, stride_memory_r,
            stride_memory_m, stride_memory_d, stride_visual_n, N, T, S, R, scale, threshold, d, M,
            BLOCK_N, BLOCK_M, BLOCK_K, VISUAL_ACTIVATION, FORM, PRECISION, DTYPE,
        )  # fmt: skip
    else:
        if tile < ffn_tiles:
            _ffn_tile(
                tile, row_tiles, x, gate, key, gate_bias, key_bias, hidden, pre, stride_x_n, stride_x_d, stride_gate_f, stride_gate_d,
                stride_key_f, stride_key_d, stride_gate_bias, stride_key_bias, stride_hidden_n, N, gate_first, F, d,
                BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, FORM, FORM_GATE, FORM_KEY, FORM_STORE, PRECISION, DTYPE,
            )  # fmt: skip
        else:
            _memory_tile(
                tile - ffn_tiles, row_tiles, x, memory, visual, scores, seed, cu_seqlens, index, lengths, stride_x_n, stride_x_d,
                stride_memory_r, stride_memory_m, stride_memory_d, stride_visual_n, N, T, S, R, scale, threshold, d, M,
                BLOCK_N, BLOCK_M, BLOCK_K, VISUAL_ACTIVATION, FORM, PRECISION, DTYPE,
            )  # fmt: skip


@triton.jit
def _ffn_tile(
    tile, row_tiles, x, gate, key, gate_bias, key_bias, hidden, pre, stride_x_n, stride_x_d, stride_gate_f, stride_gate_d,
    stride_key_f, stride_key_d, stride_gate_bias, stride_key_bias, stride_hidden_n, N, gate_first,
    F: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, FORM: tl.constexpr, FORM_GATE: tl.constexpr, FORM_KEY: tl.constexpr, FORM_STORE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = d % BLOCK_K == 0
    row_tile, column_tile = swizzle(tile, row_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_F
    if FORM_KEY == BY_PAIR:
        acc = tl.zeros((BLOCK_N, 2 * BLOCK_F), tl.float32)
        for k in tl.range(0, d, BLOCK_K):
            b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, FORM, False, WHOLE)
            b_weight = key.load([0, column, k]).reshape(2 * BLOCK_F, BLOCK_K)
            acc = tl.dot(b_x, b_weight.T, acc, input_precision=PRECISION)
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_F)), (0, 2, 1)))
        # Which weight lies lower is the allocator's choice and differs between layers: chosen here, not compiled in.
        b_gate = tl.where(gate_first != 0, low, high)
        b_key = tl.where(gate_first != 0, high, low)
    else:
        b_gate = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        b_key = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for k in tl.range(0, d, BLOCK_K):
            b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, FORM, False, WHOLE)
            if gate is not None:
                b_weight = load_tile(
                    gate,
                    column,
                    k,
                    F,
                    d,
                    stride_gate_f,
                    stride_gate_d,
                    BLOCK_F,
                    BLOCK_K,
                    FORM_GATE,
                    F % BLOCK_F == 0,
                    WHOLE,
                )
                b_gate = tl.dot(b_x, b_weight.T, b_gate, input_precision=PRECISION)
            b_weight = load_tile(
                key, column, k, F, d, stride_key_f, stride_key_d, BLOCK_F, BLOCK_K, FORM_KEY, F % BLOCK_F == 0, WHOLE
            )
            b_key = tl.dot(b_x, b_weight.T, b_key, input_precision=PRECISION)

    _store_hidden(
        b_gate, b_key, row, column, gate, gate_bias, key_bias, hidden, pre, stride_gate_bias, stride_key_bias,
        stride_hidden_n, N, F, BLOCK_N, BLOCK_F, ACTIVATION, FORM_STORE, DTYPE,
    )  # fmt: skip


@triton.jit
def _store_hidden(
    b_gate, b_key, row, column, gate, gate_bias, key_bias, hidden, pre, stride_gate_bias, stride_key_bias, stride_hidden_n,
    N, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, ACTIVATION: tl.constexpr, FORM_STORE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Biases, the pre-activations that the backward keeps, and hidden; `gate` says only whether there is one.

    In pieces of STORED_COLUMNS, half of that in float32: biases, addresses and the activation of a whole tile do not fit the registers
    beside its accumulator, nor what a descriptor stores from fit the shared memory beside the stages.
    """
    PIECE: tl.constexpr = STORED_COLUMNS * 16 // DTYPE.primitive_bitwidth
    if BLOCK_F > PIECE:
        HALF: tl.constexpr = BLOCK_F // 2
        key_low, key_high = tl.split(tl.permute(tl.reshape(b_key, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        if gate is not None:
            gate_low, gate_high = tl.split(tl.permute(tl.reshape(b_gate, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        else:
            gate_low, gate_high = key_low, key_high
        _store_hidden(
            gate_low, key_low, row, column, gate, gate_bias, key_bias, hidden, pre, stride_gate_bias, stride_key_bias,
            stride_hidden_n, N, F, BLOCK_N, HALF, ACTIVATION, FORM_STORE, DTYPE,
        )  # fmt: skip
        _store_hidden(
            gate_high, key_high, row, column + HALF, gate, gate_bias, key_bias, hidden, pre, stride_gate_bias, stride_key_bias,
            stride_hidden_n, N, F, BLOCK_N, HALF, ACTIVATION, FORM_STORE, DTYPE,
        )  # fmt: skip
    else:
        o_row = row + tl.arange(0, BLOCK_N)
        o_column = column + tl.arange(0, BLOCK_F)
        inside = (o_row[:, None] < N) & (o_column[None, :] < F)
        if key_bias is not None:
            b_key += tl.load(key_bias + o_column.to(tl.int64) * stride_key_bias, mask=o_column < F, other=0.0).to(
                tl.float32
            )[None, :]
        if pre is not None and FORM_STORE == BY_POINTER:
            o_pre = tile_pointers(pre, row, column, F, BLOCK_N, BLOCK_F)
        if gate is not None:
            if gate_bias is not None:
                b_gate += tl.load(
                    gate_bias + o_column.to(tl.int64) * stride_gate_bias, mask=o_column < F, other=0.0
                ).to(tl.float32)[None, :]
            if pre is not None:
                if FORM_STORE == BY_POINTER:
                    tl.store(o_pre, b_gate.to(DTYPE), mask=inside)
                    tl.store(o_pre + tl.cast(N, tl.int64) * F, b_key.to(DTYPE), mask=inside)
                else:
                    pre.store([0, row, column], b_gate.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
                    pre.store([1, row, column], b_key.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
            b_hidden = activate(b_gate, ACTIVATION) * b_key
        else:
            if pre is not None:
                if FORM_STORE == BY_POINTER:
                    tl.store(o_pre, b_key.to(DTYPE), mask=inside)
                else:
                    pre.store([0, row, column], b_key.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
            b_hidden = activate(b_key, ACTIVATION)
        if hidden is not None:
            if FORM_STORE == BY_POINTER:
                o_hidden = tile_pointers(hidden, row, column, stride_hidden_n, BLOCK_N, BLOCK_F)
                tl.store(o_hidden, b_hidden.to(DTYPE), mask=inside)
            else:
                hidden.store([row, column], b_hidden.to(DTYPE))


@triton.jit
def _memory_tile(
    tile, row_tiles, x, memory, visual, scores, seed, cu_seqlens, index, lengths, stride_x_n, stride_x_d, stride_memory_r,
    stride_memory_m, stride_memory_d, stride_visual_n, N, T, S, R, scale, threshold, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    WHOLE: tl.constexpr = d % BLOCK_K == 0
    meetings = row_tiles + S
    row_tile, sequence = tile_sequence(tile % meetings, cu_seqlens, S, T, BLOCK_N)
    slot = (tile // meetings) * BLOCK_M
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, cu_seqlens, S, T, N)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, index, S, R)
        slots = valid_slots(read, lengths, M)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if slot < slots:
            for k in tl.range(0, d, BLOCK_K):
                b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, FORM, False, WHOLE)
                b_memory = load_memory_tile(
                    memory, read, slot, k, M, d, stride_memory_r, stride_memory_m, stride_memory_d, BLOCK_M, BLOCK_K, FORM, WHOLE
                )  # fmt: skip
                acc = tl.dot(b_x, b_memory.T, acc, input_precision=PRECISION)
        store_visual_pieces(
            acc, visual, scores, seed, stride_visual_n, row, slot, first, end, slots, scale, threshold, M,
            BLOCK_N, BLOCK_M, VISUAL_ACTIVATION, DTYPE,
        )  # fmt: skip
