"""The memory as the kernels read it: d-wide rows formed once, or the operands that a factored memory shares with the whole batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memvp_kernels.backends.triton.launch import describable, element_type, on_device
from memvp_kernels.backends.triton.segments import valid_slots

__all__ = ["form_memory", "shared_operand"]

_BLOCK_COLUMNS = 1024


def form_memory(
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
    if position is None and lengths is None and memory.dtype == dtype and (describable(memory) or not descriptors):
        return memory
    memories, slots, width = memory.shape
    formed = torch.empty(memories, slots, width, dtype=dtype, device=memory.device)
    if formed.numel():
        grid = (memories * slots, triton.cdiv(width, _BLOCK_COLUMNS))
        with on_device(memory):
            form_memory_kernel[grid](
                memory, position, lengths, formed, *memory.stride(), *(position.stride() if position is not None else (0, 0)),
                slots, width, _BLOCK_COLUMNS, element_type(dtype),
            )  # fmt: skip
    return formed


def shared_operand(basis: Tensor, position: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[basis; position] (r + M, d) in `dtype`, the d-wide operand that every image of a factored memory shares; (r, d) without positions."""
    if position is None:
        return basis.to(dtype)
    return torch.cat([basis.to(dtype), position.to(dtype)])


@triton.jit(do_not_specialize=["M"])
def form_memory_kernel(
    memory, position, lengths, formed, stride_memory, stride_slot, stride_column, stride_position_slot, stride_position_column,
    M, d: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // M
    slot = tl.program_id(0) % M
    o_column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = o_column < d
    valid = inside & (slot < valid_slots(row, lengths, M))
    wide_column = o_column.to(tl.int64)
    base = memory + row.to(tl.int64) * stride_memory + slot.to(tl.int64) * stride_slot
    b_formed = tl.load(base + wide_column * stride_column, mask=valid, other=0.0).to(tl.float32)
    if position is not None:
        base = position + slot.to(tl.int64) * stride_position_slot
        b_formed += tl.load(base + wide_column * stride_position_column, mask=valid, other=0.0).to(tl.float32)
    tl.store(formed + tl.program_id(0).to(tl.int64) * d + o_column, b_formed.to(DTYPE), mask=inside)
