"""Inference over a memory that FFN after FFN reads, step after step: what the first call works out, the others take as it is.

A decode step on a CPU is a dozen small products, and the Python around them would take as long as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.backends.torch.activations import activate_
from memvp_kernels.backends.torch.products import product
from memvp_kernels.problem import Problem

__all__ = ["prepare"]

_Weights = Mapping[str, Any]


def prepare(p: Problem) -> Callable[[Tensor, _Weights], Tensor] | None:
    """(x, the FFN's tensors) to y, for any of the layout of `p`'s; None where a call needs more than products and activations."""
    segments = p.segments
    ragged = segments.index is not None or segments.lengths is not None or segments.cu_seqlens is not None
    if ragged or p.dropout_p > 0 or p.visual_map is not None or p.visual_drop or p.residual is not None:
        return None
    if p.key is None or not p.has_memory or p.key_operand is None:
        return None
    name, add_memory = p.activation, _memory(p)

    def step(x: Tensor, weights: _Weights) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = _ffn(name, rows, **weights)
        add_memory(y, rows)
        return y.view(x.shape)

    return step


def _ffn(
    name: str, x: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, key_bias: Tensor | None, gate_bias: Tensor | None,
    value_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    hidden = activate_(name, product(x, (key if gate is None else gate).T, key_bias if gate is None else gate_bias))
    if gate is not None:
        hidden.mul_(product(x, key.T, key_bias))
    return product(hidden, value, value_bias)


def _memory(p: Problem) -> Callable[[Tensor, Tensor], None]:
    """y += the memory's part."""
    assert p.visual_key is not None and p.visual_value is not None and p.key_operand is not None
    wide = torch.promote_types(p.x.dtype, torch.float32)
    name, scale, dtype = p.visual_activation, p.visual_scale, p.x.dtype
    # as batches of one where all rows read one image
    batch = (1, p.rows) if p.segments.shared else (p.segments.sequences, p.segments.length or 0)
    keys, values = p.visual_key.transpose(1, 2), p.visual_value
    key_operand, value_operand = p.key_operand.mT, p.value_operand
    rank = None if p.visual_basis is None else p.visual_basis.shape[0]

    def visual(scores: Tensor) -> Tensor:
        return activate_(name, scores.to(wide)).mul_(scale).to(dtype)

    def add_plain(y: Tensor, x: Tensor) -> None:
        active = visual(torch.bmm(x.view(*batch, -1), keys))
        y.view(*batch, -1).baddbmm_(active, values)

    def add_factored(y: Tensor, x: Tensor) -> None:
        assert value_operand is not None
        of_key = product(x, key_operand).view(*batch, -1)
        active = visual(torch.baddbmm(of_key[..., rank:], of_key[..., :rank], keys))
        of_value = torch.cat([torch.bmm(active, values), active], dim=-1)
        y.addmm_(of_value.view(x.shape[0], -1), value_operand)

    return add_plain if rank is None else add_factored
