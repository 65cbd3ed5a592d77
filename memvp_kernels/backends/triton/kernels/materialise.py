"""The memory as the kernels read it: d-wide rows materialised once, or the operands that a factored memory shares with the whole batch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.device.pdl import pdl_wait
from memvp_kernels.backends.triton.device.segments import valid_slots
from memvp_kernels.backends.triton.heuristics.tiles import CACHE_SIZE
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.backends.triton.runtime.pdl import pdl_options
from memvp_kernels.problem import Problem, Segments

__all__ = ["dense_segments", "key_operand", "materialise_memory", "shared_operand", "value_operand"]

# 16 numbers a thread: of 32, loaded one by one, sm_90 and sm_100 spilled 8 bytes.
_BLOCK_SLOTS, _BLOCK_COLUMNS = 8, 256


def materialise_memory(
    memory: Tensor, position: Tensor | None, lengths: Tensor | None, dtype: torch.dtype, *, descriptors: bool
) -> Tensor:
    """memory + position in float32, rounded once to `dtype`; slots past a row's length become zero.

    Zeros there let a product run over whole tiles: a visual activation is zero past the length, but 0 · NaN would not be.

    Args:
        memory: (R, M, d), any strides.
        position: (M, d) or None.
        lengths: (R,) int32 or None.
        descriptors: the caller reads the result through TMA, so a layout that TMA cannot read is copied.

    Returns:
        (R, M, d) in `dtype`: `memory` itself where nothing has to be done.
    """
    if position is None and lengths is None and memory.dtype == dtype and (tma.supports_tma(memory) or not descriptors):
        return memory
    memories, slots, width = memory.shape
    out = torch.empty(memories, slots, width, dtype=dtype, device=memory.device)
    if out.numel():
        grid = (memories * launch.programs(slots, _BLOCK_SLOTS), launch.programs(width, _BLOCK_COLUMNS))
        with launch.on_device(memory):
            materialise_memory_kernel[grid](
                memory, position, lengths, out, *memory.stride(), *(position.stride() if position is not None else (0, 0)),
                slots, width, _BLOCK_SLOTS, _BLOCK_COLUMNS, launch.element_type(dtype),
                **pdl_options(memory.device),
            )  # fmt: skip
    return out


@functools.lru_cache(CACHE_SIZE)
def dense_segments(rows: int) -> Segments:
    """All rows as one sequence: how the d-wide operands of a factored memory, shared by the batch, look to the kernels."""
    return Segments(rows=rows, sequences=1, length=rows, shared=True)


def shared_operand(basis: Tensor, position: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[basis; position] (r + M, d) in `dtype`, the d-wide operand that every image of a factored memory shares; (r, d) without positions."""
    if position is None:
        return basis.to(dtype)
    return torch.cat([basis.to(dtype), position.to(dtype)])


def key_operand(problem: Problem) -> Tensor:
    """[W; p^k] of a factored memory in x's dtype: the caller's where many calls share it."""
    if problem.key_operand is not None:
        return problem.key_operand
    assert problem.visual_basis is not None
    return shared_operand(problem.visual_basis, problem.key_position, problem.x.dtype)


def value_operand(problem: Problem) -> Tensor:
    """[W; p^v], likewise."""
    if problem.value_operand is not None:
        return problem.value_operand
    assert problem.visual_basis is not None
    return shared_operand(problem.visual_basis, problem.value_position, problem.x.dtype)


@triton.jit(do_not_specialize=["M"])
def materialise_memory_kernel(
    memory, position, lengths, out, stride_memory, stride_slot, stride_column, stride_position_slot, stride_position_column,
    M, d: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    slot_tiles = tl.cdiv(M, BLOCK_SLOTS)
    row = tl.program_id(0) // slot_tiles
    o_slot = (tl.program_id(0) % slot_tiles * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS))[:, None]
    o_column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (o_slot < M) & (o_column < d)
    valid = inside & (o_slot < valid_slots(row, lengths, M))
    wide_slot, wide_column = o_slot.to(tl.int64), o_column.to(tl.int64)
    o_memory = row.to(tl.int64) * stride_memory + wide_slot * stride_slot + wide_column * stride_column
    b_memory = tl.load(memory + o_memory, mask=valid, other=0.0).to(tl.float32)
    if position is not None:
        o_position = wide_slot * stride_position_slot + wide_column * stride_position_column
        b_memory += tl.load(position + o_position, mask=valid, other=0.0).to(tl.float32)
    o_out = (row.to(tl.int64) * M + wide_slot) * d + wide_column
    tl.store(out + o_out, b_memory.to(DTYPE), mask=inside)
