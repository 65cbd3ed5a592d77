"""The definition of the operator in float64: a plain loop over sequences that shares no code with the backends.

It is slow on purpose, and differentiable: its autograd gradients are the reference for the hand-written ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["activate", "ffn", "sequences", "stays"]


def activate(name: str, z: Tensor) -> Tensor:
    """One of the contract's activations by its formula."""
    if name == "relu":
        return z * (z > 0)
    if name == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "silu":
        return z * torch.sigmoid(z)
    if name == "identity":
        return z
    raise ValueError(f"no activation called {name!r}")


def stays(scores: Tensor, drop: float) -> Tensor:
    """[score ≥ θ] of scores (rows, valid slots), where int(drop · slots) scores of a row lie below θ unless there are ties."""
    rank = int(drop * scores.shape[1])
    return scores >= scores.sort(dim=1).values[:, rank : rank + 1]


def sequences(
    x: Tensor, visual_key: Tensor | None, visual_index: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, int, int]]:
    """(first row, end row, memory row or -1) of every sequence, over x flattened to rows."""
    rows = math.prod(x.shape[:-1])
    if cu_seqlens is not None:
        ends = [int(c) for c in cu_seqlens]
        spans = list(zip(ends[:-1], ends[1:], strict=True))
    elif x.dim() == 3 and visual_key is not None and (visual_key.dim() == 3 or visual_index is not None):
        spans = [(s * x.shape[1], (s + 1) * x.shape[1]) for s in range(x.shape[0])]
    else:
        spans = [(0, rows)]
    if visual_index is not None:
        index = [int(i) for i in visual_index]
    elif visual_key is not None and visual_key.dim() == 2:
        index = [0] * len(spans)
    else:
        index = list(range(len(spans)))
    return [(a, b, i) for (a, b), i in zip(spans, index, strict=True)]


def ffn(
    x: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    visual_key: Tensor | None = None,
    visual_value: Tensor | None = None,
    *,
    visual_basis: Tensor | None = None,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_position: Tensor | None = None,
    value_position: Tensor | None = None,
    activation: str = "silu",
    visual_activation: str | None = None,
    visual_map: str | None = None,
    visual_drop: float = 0.0,
    visual_scale: float = 1.0,
    visual_lengths: Tensor | None = None,
    visual_index: Tensor | None = None,
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """act(x·[K;Kv]ᵀ)·[V;Vv] as SPEC section 1 writes it; arguments as :func:`memvp_kernels.fused_ffn`, computed in float64.

    Args:
        keep: (N, M) bool, the dropout mask to apply (True keeps); required when ``dropout_p`` > 0.

    Returns:
        float64, the shape of x. No argument is checked.
    """

    def wide(t: Tensor) -> Tensor:
        return t.to(torch.float64)

    rows = wide(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    y = torch.zeros_like(rows)
    if key is not None and value is not None:
        up = rows @ wide(key).T
        if key_bias is not None:
            up = up + wide(key_bias)
        if gate is None:
            hidden = activate(activation, up)
        else:
            z = rows @ wide(gate).T
            if gate_bias is not None:
                z = z + wide(gate_bias)
            hidden = activate(activation, z) * up
        y = y + hidden @ wide(value)
        if value_bias is not None:
            y = y + wide(value_bias)
    if visual_key is not None and visual_value is not None:
        parts = []
        covered = 0
        spans = sequences(x, visual_key, visual_index, cu_seqlens)
        vact = visual_activation or activation
        memory = [wide(t if t.dim() == 3 else t[None]) for t in (visual_key, visual_value)]
        for first, end, row in spans:
            part = torch.zeros_like(rows[first:end])
            if row >= 0:
                k, v = (m[row] if visual_basis is None else m[row] @ wide(visual_basis) for m in memory)
                k = k if key_position is None else k + wide(key_position)
                v = v if value_position is None else v + wide(value_position)
                slots = k.shape[0] if visual_lengths is None else int(visual_lengths[row])
                q, k = rows[first:end], k[:slots]
                scores = q @ k.T if visual_map is None else activate(visual_map, q) @ activate(visual_map, k).T
                visual = activate(vact, scores) * stays(scores, visual_drop)
                if keep is not None:
                    visual = visual * keep[first:end, :slots] / (1 - dropout_p) if dropout_p < 1 else visual * 0
                part = visual_scale * (visual @ v[:slots])
            parts.append(part)
            covered += end - first
        y = y + torch.cat([*parts, torch.zeros_like(rows[covered:])])
    y = y.reshape(x.shape)
    return y if residual is None else y + wide(residual)
