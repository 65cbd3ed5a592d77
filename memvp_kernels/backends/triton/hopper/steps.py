"""The four large steps by the Gluon kernels: what is dense in them, and the fused kernels' own tiles for the rest of a memory per sequence.

Each function takes the place of the fused kernel's, argument for argument, as those of `library.py` do, and is that kernel's where the
Gluon kernels can't take its operands (`operands.takes`) or nothing in it is dense. Dense are the FFN's products, a memory that all rows
read, and in output and dx the memories of sequences that no row tile straddles; scores and their gradients, with an activation and dropout of
their own, are the fused kernels', launched alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memvp_kernels.backends.triton import launch, ring_tiles
from memvp_kernels.backends.triton.chain import chained
from memvp_kernels.backends.triton.dhidden import HiddenGradients, dhidden_backward, memory_backward
from memvp_kernels.backends.triton.dinput import dinput_backward
from memvp_kernels.backends.triton.hidden import Products, hidden_forward, memory_forward
from memvp_kernels.backends.triton.hopper.dhidden import gluon_dhidden_kernel
from memvp_kernels.backends.triton.hopper.hidden import gluon_hidden_kernel
from memvp_kernels.backends.triton.hopper.operands import describe, programs, takes
from memvp_kernels.backends.triton.hopper.output import gluon_output_kernel
from memvp_kernels.backends.triton.operands import BY_COLUMN, BY_ROW
from memvp_kernels.backends.triton.output import add_own_memory, output_forward
from memvp_kernels.backends.triton.ring_tiles import ring_tile
from memvp_kernels.backends.triton.visual import Visual
from memvp_kernels.problem import Segments

__all__ = ["dhidden", "dinput", "hidden", "output"]

_ROAD = "gluon"


def hidden(
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
    """As `hidden_forward`."""
    shared = memory[0] if memory is not None and visual is None and segments.shared else None
    forms = {launch.form_of(w) for w in (gate, key) if w is not None}
    contiguous = [key.shape[0]] if key is not None and save_hidden else []
    # Two weights in one right tile lie the same way round.
    taken = takes(x, [x, shared], [gate, key], contiguous) and len(forms) <= 1
    if not taken or (key is None and shared is None):
        return hidden_forward(
            x, key, gate, key_bias, gate_bias, activation, memory, segments, visual,
            save_hidden=save_hidden, save_scores=save_scores, need_hidden=need_hidden,
        )  # fmt: skip
    made = _hidden(x, key, gate, key_bias, gate_bias, activation, shared, save_hidden, need_hidden)
    if memory is None or shared is not None:
        return made
    own = memory_forward(x, activation, memory, segments, visual, save_scores=save_scores)
    return Products(made.hidden, made.pre, own.visual, own.scores)


def _hidden(
    x: Tensor,
    key: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    shared: Tensor | None,
    save_hidden: bool,
    need_hidden: bool,
) -> Products:
    rows, width = x.shape
    pairs, slots, branches = _rows(key), _rows(shared), 1 + (gate is not None)
    pre = x.new_empty(branches, rows, pairs) if save_hidden and key is not None else None
    formed = launch.empty_rows(rows, pairs, x) if key is not None and need_hidden else None
    columns = launch.empty_rows(rows, slots, x) if shared is not None else None

    tile = ring_tile(launch.chip(x.device), _ROAD, rows, (branches * pairs, slots), width)
    form = BY_ROW.value if key is None else launch.form_of(key)
    wide, block_f = tile.columns, tile.columns // branches
    pre_gate = pre[0] if pre is not None and branches == 2 else None
    pre_key = pre[-1] if pre is not None else None
    left, weight = (tile.block_n, tile.block_k), (block_f, tile.block_k)
    count = _tiles(rows, pairs, tile.block_n, block_f) + _tiles(rows, slots, tile.block_n, wide)
    with launch.on_device(x):
        gluon_hidden_kernel[programs(x, count)](
            describe(x, left), describe(gate, weight, form), describe(key, weight, form), _contiguous(gate_bias), _contiguous(key_bias),
            describe(shared, (wide, tile.block_k)), describe(formed, left), describe(pre_gate, left), describe(pre_key, left),
            describe(columns, left), rows,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_F=block_f, BLOCK_K=tile.block_k, STAGES=tile.stages, GROUP=tile.group,
            K_MAJOR=form == BY_ROW.value, ACTIVATION=activation, DTYPE=launch.element_type(x.dtype), num_warps=tile.warps, **chained(x.device),
        )  # fmt: skip
    return Products(formed, pre, None, columns)


def output(
    hidden: Tensor | None,
    value: Tensor | None,
    value_bias: Tensor | None,
    visual: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    residual: Tensor | None,
    like: Tensor,
) -> Tensor:
    """As `output_forward`."""
    if not takes(like, [hidden, visual, memory, residual], [value], [like.shape[1]]):
        return output_forward(hidden, value, value_bias, visual, memory, segments, residual, like)
    if visual is None or memory is None or _dense(segments):
        return _sum([(hidden, value)], visual, memory, segments, value_bias, residual, like)
    if hidden is None:
        return output_forward(None, None, value_bias, visual, memory, segments, residual, like)
    y = _sum([(hidden, value)], None, None, segments, value_bias, residual, like)
    return add_own_memory(y, visual, memory, segments)


def dinput(
    dpre: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    dscores: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    like: Tensor,
) -> Tensor:
    """As `dinput_backward`."""
    if not takes(like, [dpre, dscores, memory], [gate, key], [like.shape[1]]):
        return dinput_backward(dpre, key, gate, dscores, memory, segments, like)
    branches = [] if dpre is None else [(dpre[-1], key)] if gate is None else [(dpre[0], gate), (dpre[-1], key)]
    if dscores is None or memory is None or _dense(segments):
        return _sum(branches, dscores, memory, segments, None, None, like)
    if dpre is None:
        return dinput_backward(None, None, None, dscores, memory, segments, like)
    dx = _sum(branches, None, None, segments, None, None, like)
    return add_own_memory(dx, dscores, memory, segments)


def _dense(segments: Segments) -> bool:
    """Whether a memory's product is one of whole row tiles: read by all rows, or by sequences whose edges are tiles'."""
    return segments.shared or ring_tiles.whole(segments.sequences, segments.length)


def _sum(
    branches: Sequence[tuple[Tensor | None, Tensor | None]],
    visual: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    bias: Tensor | None,
    residual: Tensor | None,
    like: Tensor,
) -> Tensor:
    """Σ left · weight over up to two branches + visual · memory + bias + residual (N, d)."""
    rows, width = like.shape
    (first, weight), (second, other) = (*branches, (None, None), (None, None))[:2]
    y = torch.empty(rows, width, dtype=like.dtype, device=like.device)
    slots = 0 if memory is None else memory.shape[1]
    depth = _rows(weight) + _rows(other) + slots
    tile = ring_tile(launch.chip(like.device), _ROAD, rows, (width,), depth)
    left, right = (tile.block_n, tile.block_k), (tile.block_k, tile.columns)
    form, other_form = (BY_ROW.value if w is None else launch.form_of(w) for w in (weight, other))
    own = not segments.shared
    block_memory = (1, *right) if own else right
    with launch.on_device(like):
        gluon_output_kernel[programs(like, _tiles(rows, width, tile.block_n, tile.columns))](
            describe(first, left), describe(weight, right, form), describe(second, left), describe(other, right, other_form),
            describe(visual, left), describe(memory if memory is None or own else memory[0], block_memory), segments.index, _contiguous(bias),
            describe(residual, left), describe(y, left), rows, segments.length or 0, segments.sequences,
            _rows(memory), F=_rows(weight), d=width, M=slots,
            BLOCK_N=tile.block_n, BLOCK_D=tile.columns, BLOCK_K=tile.block_k, STAGES=tile.stages, GROUP=tile.group,
            K_MAJOR=form == BY_COLUMN.value, K_MAJOR_SECOND=other_form == BY_COLUMN.value, OWN=own,
            DTYPE=launch.element_type(like.dtype), num_warps=tile.warps, **chained(like.device),
        )  # fmt: skip
    return y


def dhidden(
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
    """As `dhidden_backward`."""
    shared = memory[0] if memory is not None and scores is None else None
    if not takes(grad, [grad, pre, shared], [value], []) or (value is None and shared is None):
        return dhidden_backward(
            grad, value, pre, activation, memory, memories, scores, segments, visual, need_visual=need_visual, overwrite=overwrite
        )  # fmt: skip
    made = _dhidden(grad, value, pre, activation, shared, overwrite)
    if scores is None:
        return made
    own = memory_backward(grad, activation, memory, memories, scores, segments, visual, need_visual=need_visual)
    return HiddenGradients(made.dpre, own.dscores, own.visual, None)


def _dhidden(
    grad: Tensor, value: Tensor | None, pre: Tensor | None, activation: str, shared: Tensor | None, overwrite: bool
) -> HiddenGradients:
    rows, width = grad.shape
    pairs, slots = _rows(value), _rows(shared)
    dpre = pre if pre is None or overwrite else torch.empty_like(pre)
    columns = launch.empty_rows(rows, slots, grad) if shared is not None else None

    tile = ring_tile(launch.chip(grad.device), _ROAD, rows, (pairs, slots), width)
    form = BY_ROW.value if value is None else launch.form_of(value)
    left, weight = (tile.block_n, tile.block_k), (tile.columns, tile.block_k)
    branches: list[Tensor | None] = []
    for t in (pre, dpre):
        branches += [None, None] if t is None else [t[0], t[1] if t.shape[0] == 2 else None]
    count = _tiles(rows, pairs, tile.block_n, tile.columns) + _tiles(rows, slots, tile.block_n, tile.columns)
    with launch.on_device(grad):
        gluon_dhidden_kernel[programs(grad, count)](
            describe(grad, left), describe(value, weight, form), *(describe(t, left) for t in branches), describe(shared, weight),
            describe(columns, left), rows,
            F=pairs, d=width, M=slots, BLOCK_N=tile.block_n, BLOCK_F=tile.columns, BLOCK_K=tile.block_k, STAGES=tile.stages, GROUP=tile.group,
            K_MAJOR=form == BY_ROW.value, ACTIVATION=activation, DTYPE=launch.element_type(grad.dtype), num_warps=tile.warps, **chained(grad.device),
        )  # fmt: skip
    return HiddenGradients(dpre, None, None, columns)


def _tiles(rows: int, columns: int, block_rows: int, block_columns: int) -> int:
    return launch.programs(rows, block_rows) * launch.programs(columns, block_columns)


def _rows(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.shape[0]


def _contiguous(bias: Tensor | None) -> Tensor | None:
    """A strided bias costs a copy here and would cost every tile's epilogue an address a column."""
    return None if bias is None else bias.contiguous()
