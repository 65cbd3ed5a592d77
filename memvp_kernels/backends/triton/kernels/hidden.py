"""The hidden kernel: act(x Gᵀ + b_G) ⊙ (x Kᵀ + b_K), and in the same launch x Kvᵀ of every sequence with its own activation.

Gate and key share a tile, so the activation is in the epilogue: of one wide accumulator where one descriptor can span both weights, of two
otherwise. With a factored memory the tiles over slots, one sequence wide and without an activation, are the columns x [W; p^k]ᵀ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.activations import activate
from memvp_kernels.backends.triton.device.operands import (
    POINTER,
    TMA,
    TMA_PAIR,
    load_memory_tile,
    load_tile,
    swizzle,
    tile_pointers,
)
from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import memory_row, sequence_bounds, tile_sequence, valid_slots
from memvp_kernels.backends.triton.device.visual import Visual, store_visual_subtiles
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.launch import strides
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Segments

__all__ = ["Products", "hidden_forward", "hidden_fwd_kernel", "memory_forward"]


class Products(NamedTuple):
    """Results of one launch in x's dtype, None where not asked for: hidden (N, F), pre (P, N, F), visual (N, M), scores (N, M)."""

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
        need_hidden: False where the backward recomputes the pre-activations: hidden itself is not stored.
    """
    rows, width = x.shape
    pairs = 0 if key is None else key.shape[0]
    slots = 0 if memory is None else memory.shape[1]
    gated = gate is not None
    out = Products(
        hidden=launch.empty_rows(rows, pairs, x) if key is not None and need_hidden else None,
        pre=x.new_empty(1 + gated, rows, pairs) if save_hidden and key is not None else None,
        visual=launch.empty_rows(rows, slots, x) if memory is not None and visual is not None else None,
        scores=_scores(rows, slots, x, segments) if memory is not None and save_scores else None,
    )

    loads = [TMA.value if w is None else tma.load_mode(w) for w in (key, gate)]
    aligned = tma.supports_tma(x) and (memory is None or tma.supports_tma(memory)) and POINTER.value not in loads
    use_tma = aligned and launch.has_tma(x.device)
    load_key, load_gate = loads if use_tma else (POINTER.value, POINTER.value)
    paired = use_tma and gate is not None and key is not None and tma.can_pair(gate, key)
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
        load_key = load_gate = TMA_PAIR.value
        gate_first = int(gate.data_ptr() < key.data_ptr())
        key_operand = gate_operand = tma.make_pair_descriptor(gate, key, block_weight)
    else:
        key_operand = tma.make_descriptor(key, block_weight, load_key)
        gate_operand = tma.make_descriptor(gate, block_weight, load_gate)
    load = TMA.value if use_tma else POINTER.value

    row_tiles = launch.programs(rows, tile.block_n)
    ffn_tiles = row_tiles * launch.programs(pairs, tile.columns)
    memory_tiles = (row_tiles + segments.sequences) * launch.programs(slots, wide)
    programs = ffn_tiles + memory_tiles
    # Results leave by TMA, asynchronously, where no visual tile with dropout and an activation of its own fills the registers. Then a
    # program may own several tiles, and load for the next one while the last one's stores are under way.
    results = [t for t in (out.hidden, out.pre) if t is not None]
    stored = use_tma and visual is None and x.dtype != torch.float32 and all(map(tma.supports_tma, results))
    store = (TMA if stored else POINTER).value
    subtile = tiles.epilogue_columns(chip, x.dtype)
    block_store = (tile.block_n, min(tile.columns, subtile))
    accumulated = tile.columns * (1 + gated)
    persistent = stored and tiles.is_persistent(chip, tile, x.dtype, accumulated, programs)
    try:
        with launch.on_device(x):
            hidden_fwd_kernel[(min(programs, chip.multiprocessors) if persistent else programs,)](
                tma.make_descriptor(x, (tile.block_n, tile.block_k), load), gate_operand, key_operand, gate_bias, key_bias,
                tma.make_descriptor(memory, block_memory, load),
                tma.make_descriptor(out.hidden, block_store, store),
                tma.make_descriptor(out.pre, (1, *block_store), store),
                out.visual, out.scores,
                visual.seed if visual is not None else None, segments.cu_seqlens, segments.index, segments.lengths,
                *x.stride(), *strides(gate, 2), *strides(key, 2), *strides(memory, 3), *strides(gate_bias, 1), *strides(key_bias, 1),
                *strides(out.hidden, 1), *strides(out.visual, 1),
                rows, segments.length or 0, segments.sequences, memory.shape[0] if memory is not None else 0, gate_first,
                visual.scale if visual is not None else 1.0, visual.threshold if visual is not None else 0,
                F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_F=tile.columns, BLOCK_K=tile.block_k, GROUP=tile.group,
                ACTIVATION=activation, VISUAL_ACTIVATION=visual.activation if visual is not None else "identity",
                LOAD=load, LOAD_GATE=load_gate, LOAD_KEY=load_key, STORE=store, SUBTILE=subtile, PERSISTENT=persistent,
                PRECISION=shape.precision, DTYPE=launch.element_type(x.dtype),
                num_warps=tile.warps, num_stages=tile.stages, **pdl_options(x.device),
            )  # fmt: skip
    except RuntimeError:
        if not paired:
            raise
        # The driver refused to encode a descriptor over two allocations, and nothing was launched.
        tma.refuse_pairs()
        return hidden_forward(
            x, key, gate, key_bias, gate_bias, activation, memory, segments, visual,
            save_hidden=save_hidden, save_scores=save_scores, need_hidden=need_hidden,
        )  # fmt: skip
    return out


def memory_forward(
    x: Tensor, activation: str, memory: Tensor, segments: Segments, visual: Visual | None, *, save_scores: bool
) -> Products:
    """The memory's tiles alone, where the FFN is computed elsewhere; arguments as `hidden_forward`."""
    return hidden_forward(
        x, None, None, None, None, activation, memory, segments, visual, save_hidden=False, save_scores=save_scores
    )


def _scores(rows: int, slots: int, x: Tensor, segments: Segments) -> Tensor:
    # No tile covers the rows of packed x outside every sequence; their scores are 0.
    return (x.new_zeros if segments.cu_seqlens is not None else x.new_empty)(rows, slots)


@triton.jit(do_not_specialize=["N", "T", "S", "R", "gate_first", "threshold"])
def hidden_fwd_kernel(
    x, gate, key, gate_bias, key_bias, memory, hidden, pre, visual, scores, seed, cu_seqlens, index, lengths,
    stride_x_n, stride_x_d, stride_gate_f, stride_gate_d, stride_key_f, stride_key_d,
    stride_memory_r, stride_memory_m, stride_memory_d, stride_gate_bias, stride_key_bias, stride_hidden_n, stride_visual_n,
    N, T, S, R, gate_first, scale, threshold,
    F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr,
    LOAD: tl.constexpr, LOAD_GATE: tl.constexpr, LOAD_KEY: tl.constexpr, STORE: tl.constexpr, SUBTILE: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles: first cdiv(N, BLOCK_N) · cdiv(F, BLOCK_F) of the FFN, then the memory's, which are fewer and end the last wave.

    One program each, or with PERSISTENT every num_programs-th.
    """
    pdl_wait(PDL)
    x_strides = (stride_x_n, stride_x_d)
    gate_side = (gate, gate_bias, stride_gate_f, stride_gate_d, stride_gate_bias)
    key_side = (key, key_bias, stride_key_f, stride_key_d, stride_key_bias, gate_first)
    memory_strides = (stride_memory_r, stride_memory_m, stride_memory_d)
    visual_out = (visual, scores, seed, stride_visual_n, scale, threshold)
    segments = (cu_seqlens, index, lengths, N, T, S, R)
    if PERSISTENT:
        count = tl.cdiv(N, BLOCK_N) * tl.cdiv(F, BLOCK_F)
        if memory is not None:
            BLOCK_M: tl.constexpr = 2 * BLOCK_F if LOAD_KEY == TMA_PAIR else BLOCK_F
            count += (tl.cdiv(N, BLOCK_N) + S) * tl.cdiv(M, BLOCK_M)
        for tile in tl.range(tl.program_id(0), count, tl.num_programs(0)):
            _tile(
                tile, x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, memory, memory_strides, visual_out, segments,
                F, d, M, BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, VISUAL_ACTIVATION, LOAD, LOAD_GATE, LOAD_KEY, STORE, SUBTILE,
                PRECISION, DTYPE,
            )  # fmt: skip
    else:
        _tile(
            tl.program_id(0), x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, memory, memory_strides, visual_out, segments,
            F, d, M, BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, VISUAL_ACTIVATION, LOAD, LOAD_GATE, LOAD_KEY, STORE, SUBTILE,
            PRECISION, DTYPE,
        )  # fmt: skip


@triton.jit
def _tile(
    tile, x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, memory, memory_strides, visual_out, segments,
    F: tl.constexpr, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr,
    LOAD: tl.constexpr, LOAD_GATE: tl.constexpr, LOAD_KEY: tl.constexpr, STORE: tl.constexpr, SUBTILE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    # One accumulator's width; a memory tile spans all of it.
    BLOCK_M: tl.constexpr = 2 * BLOCK_F if LOAD_KEY == TMA_PAIR else BLOCK_F
    N = segments[3]
    row_tiles = tl.cdiv(N, BLOCK_N)
    ffn_tiles = row_tiles * tl.cdiv(F, BLOCK_F)
    if memory is None:
        _ffn_tile(
            tile, row_tiles, x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, N, F, d,
            BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, LOAD, LOAD_GATE, LOAD_KEY, STORE, SUBTILE, PRECISION, DTYPE,
        )  # fmt: skip
    elif F == 0:
        _memory_tile(
            tile, row_tiles, x, x_strides, memory, memory_strides, visual_out, segments, d, M, BLOCK_N, BLOCK_M, BLOCK_K,
            VISUAL_ACTIVATION, LOAD, PRECISION, DTYPE,
        )  # fmt: skip
    else:
        if tile < ffn_tiles:
            _ffn_tile(
                tile, row_tiles, x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, N, F, d,
                BLOCK_N, BLOCK_F, BLOCK_K, GROUP, ACTIVATION, LOAD, LOAD_GATE, LOAD_KEY, STORE, SUBTILE, PRECISION, DTYPE,
            )  # fmt: skip
        else:
            _memory_tile(
                tile - ffn_tiles, row_tiles, x, x_strides, memory, memory_strides, visual_out, segments, d, M, BLOCK_N, BLOCK_M,
                BLOCK_K, VISUAL_ACTIVATION, LOAD, PRECISION, DTYPE,
            )  # fmt: skip


@triton.jit
def _ffn_tile(
    tile, row_tiles, x, x_strides, gate_side, key_side, hidden, pre, stride_hidden_n, N,
    F: tl.constexpr, d: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, LOAD: tl.constexpr, LOAD_GATE: tl.constexpr, LOAD_KEY: tl.constexpr, STORE: tl.constexpr, SUBTILE: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    EVEN_K: tl.constexpr = d % BLOCK_K == 0
    EVEN_F: tl.constexpr = F % BLOCK_F == 0
    gate, gate_bias, stride_gate_f, stride_gate_d, stride_gate_bias = gate_side
    key, key_bias, stride_key_f, stride_key_d, stride_key_bias, gate_first = key_side
    stride_x_n, stride_x_d = x_strides
    row_tile, column_tile = swizzle(tile, row_tiles, tl.cdiv(F, BLOCK_F), GROUP)
    row = row_tile * BLOCK_N
    column = column_tile * BLOCK_F
    if LOAD_KEY == TMA_PAIR:
        acc = tl.zeros((BLOCK_N, 2 * BLOCK_F), tl.float32)
        for k in tl.range(0, d, BLOCK_K):
            b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
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
            b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
            if gate is not None:
                b_weight = load_tile(
                    gate, column, k, F, d, stride_gate_f, stride_gate_d, BLOCK_F, BLOCK_K, LOAD_GATE, EVEN_F, EVEN_K
                )  # fmt: skip
                b_gate = tl.dot(b_x, b_weight.T, b_gate, input_precision=PRECISION)
            b_weight = load_tile(
                key, column, k, F, d, stride_key_f, stride_key_d, BLOCK_F, BLOCK_K, LOAD_KEY, EVEN_F, EVEN_K
            )  # fmt: skip
            b_key = tl.dot(b_x, b_weight.T, b_key, input_precision=PRECISION)

    biases = (gate_bias, key_bias, stride_gate_bias, stride_key_bias)
    _store_hidden(
        b_gate, b_key, row, column, biases, hidden, pre, stride_hidden_n, N, F, gate is not None, ACTIVATION, STORE, SUBTILE, DTYPE
    )  # fmt: skip


@triton.jit
def _store_hidden(
    b_gate, b_key, row, column, biases, hidden, pre, stride_hidden_n, N,
    F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, STORE: tl.constexpr, SUBTILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Biases, the pre-activations that the backward keeps, and hidden.

    In subtiles of SUBTILE columns: biases, addresses and the activation of a whole tile do not fit the registers
    beside its accumulator, nor does what a descriptor stores from fit the shared memory beside the stages.
    """
    BLOCK_N: tl.constexpr = b_key.shape[0]
    BLOCK_F: tl.constexpr = b_key.shape[1]
    if BLOCK_F > SUBTILE:
        HALF: tl.constexpr = BLOCK_F // 2
        key_low, key_high = tl.split(tl.permute(tl.reshape(b_key, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        if GATED:
            gate_low, gate_high = tl.split(tl.permute(tl.reshape(b_gate, (BLOCK_N, 2, HALF)), (0, 2, 1)))
        else:
            gate_low, gate_high = key_low, key_high
        _store_hidden(
            gate_low, key_low, row, column, biases, hidden, pre, stride_hidden_n, N, F, GATED, ACTIVATION, STORE, SUBTILE, DTYPE
        )  # fmt: skip
        _store_hidden(
            gate_high, key_high, row, column + HALF, biases, hidden, pre, stride_hidden_n, N, F, GATED, ACTIVATION, STORE, SUBTILE, DTYPE
        )  # fmt: skip
    else:
        gate_bias, key_bias, stride_gate_bias, stride_key_bias = biases
        o_row = row + tl.arange(0, BLOCK_N)
        o_column = column + tl.arange(0, BLOCK_F)
        inside = (o_row[:, None] < N) & (o_column[None, :] < F)
        if key_bias is not None:
            o_bias = o_column.to(tl.int64) * stride_key_bias
            b_key += tl.load(key_bias + o_bias, mask=o_column < F, other=0.0).to(tl.float32)[None, :]
        if pre is not None and STORE == POINTER:
            o_pre = tile_pointers(pre, row, column, F, BLOCK_N, BLOCK_F)
        if GATED:
            if gate_bias is not None:
                o_bias = o_column.to(tl.int64) * stride_gate_bias
                b_gate += tl.load(gate_bias + o_bias, mask=o_column < F, other=0.0).to(tl.float32)[None, :]
            if pre is not None:
                if STORE == POINTER:
                    tl.store(o_pre, b_gate.to(DTYPE), mask=inside)
                    tl.store(o_pre + tl.cast(N, tl.int64) * F, b_key.to(DTYPE), mask=inside)
                else:
                    pre.store([0, row, column], b_gate.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
                    pre.store([1, row, column], b_key.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
            b_hidden = activate(b_gate, ACTIVATION) * b_key
        else:
            if pre is not None:
                if STORE == POINTER:
                    tl.store(o_pre, b_key.to(DTYPE), mask=inside)
                else:
                    pre.store([0, row, column], b_key.to(DTYPE).reshape(1, BLOCK_N, BLOCK_F))
            b_hidden = activate(b_key, ACTIVATION)
        if hidden is not None:
            if STORE == POINTER:
                o_hidden = tile_pointers(hidden, row, column, stride_hidden_n, BLOCK_N, BLOCK_F)
                tl.store(o_hidden, b_hidden.to(DTYPE), mask=inside)
            else:
                hidden.store([row, column], b_hidden.to(DTYPE))


@triton.jit
def _memory_tile(
    tile, row_tiles, x, x_strides, memory, memory_strides, visual_out, segments, d: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, VISUAL_ACTIVATION: tl.constexpr, LOAD: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    EVEN_K: tl.constexpr = d % BLOCK_K == 0
    cu_seqlens, index, lengths, N, T, S, R = segments
    stride_x_n, stride_x_d = x_strides
    pairs = row_tiles + S
    row_tile, sequence = tile_sequence(tile % pairs, segments, BLOCK_N)
    slot = (tile // pairs) * BLOCK_M
    row = row_tile * BLOCK_N
    first, end = sequence_bounds(sequence, segments)
    if (first < row + BLOCK_N) & (end > row):
        read = memory_row(sequence, segments)
        slots = valid_slots(read, lengths, M)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if slot < slots:
            for k in tl.range(0, d, BLOCK_K):
                b_x = load_tile(x, row, k, N, d, stride_x_n, stride_x_d, BLOCK_N, BLOCK_K, LOAD, False, EVEN_K)
                b_memory = load_memory_tile(memory, read, slot, k, M, d, memory_strides, BLOCK_M, BLOCK_K, LOAD, EVEN_K)
                acc = tl.dot(b_x, b_memory.T, acc, input_precision=PRECISION)
        store_visual_subtiles(acc, visual_out, row, slot, first, end, slots, None, M, VISUAL_ACTIVATION, DTYPE)
