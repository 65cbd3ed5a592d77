"""The one normalized problem that every backend takes: what :func:`memvp_kernels.fused_ffn` was asked, checked and flattened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.checks import cast_dtype

__all__ = [
    "BEHIND_PRE",
    "BEHIND_SCORES",
    "BEHIND_VISUAL",
    "MEMORY",
    "SHARED",
    "Problem",
    "Segments",
    "contain",
    "has_slots",
    "known_finite",
    "narrow",
    "normalize",
]

#: Gradients that may be asked for in float32 at least, added to those of other calls: of a memory whose key and value are one tensor,
#: and of the joined operands of :mod:`memvp_kernels.shared_memory`.
SHARED = ("core", "key_operand", "value_operand")

#: What the visual branch reads besides x.
MEMORY = ("visual_key", "visual_value", "visual_basis", "key_position", "value_position", *SHARED)

#: Arguments whose gradient passes through the gradient of the pre-activations, of the scores, or takes the visual activations.
BEHIND_PRE = frozenset(("x", "key", "gate", "key_bias", "gate_bias"))
BEHIND_SCORES = frozenset(("x", "visual_key", "visual_basis", "key_position", "core", "key_operand"))
BEHIND_VISUAL = frozenset(("visual_value", "visual_basis", "value_position", "core", "value_operand"))


@dataclass(frozen=True)
class Segments:
    """Which rows of x form a sequence, and which memory row that sequence reads.

    Attributes:
        rows: N, the rows of the flattened x.
        sequences: S.
        length: T when every sequence has the same length (row n belongs to sequence n // T); None when packed.
        cu_seqlens: (S + 1,) int32, packed only: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]; rows outside have no memory.
        index: (S,) int32, the memory row of each sequence; anything outside [0, R) means none. None: sequence s reads row s.
        lengths: (R,) int32, valid slots of each memory row; anything outside [0, M] means none. None: all M.
        shared: every row of x reads memory row 0 (then index is None, S is 1 and T is N).
    """

    rows: int
    sequences: int
    length: int | None
    cu_seqlens: Tensor | None = None
    index: Tensor | None = None
    lengths: Tensor | None = None
    shared: bool = False


@dataclass(frozen=True)
class Problem:
    """Arguments of :func:`memvp_kernels.fused_ffn` after the checks; x has been flattened to rows and memory to (R, M, ·).

    Shapes are those of the contract: x (N, d); key, value, gate (F, d); key_bias, gate_bias (F,); value_bias (d,);
    visual_key, visual_value (R, M, d), or cores (R, M, r) under visual_basis (r, d); positions (M, d); residual (N, d);
    seed (1,) int64, present iff dropout_p > 0. Weights share x's dtype; biases and everything of the memory may be wider.

    A factored memory that many calls read comes in x's dtype with key_operand [visual_basis; key_position] and value_operand
    [visual_basis; value_position] (r + M, d), contiguous, of which basis and positions are views; visual_key is visual_value then.

    Under a visual_map key_operand is φ(Kv) (R, M, d) in x's dtype, and backends read no other part of the key. A gradient of
    visual_basis or core is then the values' share alone: :mod:`memvp_kernels.feature_map` adds the key's.
    """

    x: Tensor
    key: Tensor | None
    value: Tensor | None
    gate: Tensor | None
    key_bias: Tensor | None
    gate_bias: Tensor | None
    value_bias: Tensor | None
    visual_key: Tensor | None
    visual_value: Tensor | None
    visual_basis: Tensor | None
    key_position: Tensor | None
    value_position: Tensor | None
    residual: Tensor | None
    seed: Tensor | None
    segments: Segments
    activation: str
    visual_activation: str
    visual_scale: float
    dropout_p: float
    visual_map: str | None = None
    visual_drop: float = 0.0
    key_operand: Tensor | None = None
    value_operand: Tensor | None = None

    @property
    def core(self) -> Tensor | None:
        """The memory where key and value are one tensor."""
        return self.visual_key if self.visual_value is self.visual_key else None

    @property
    def rows(self) -> int:
        """N."""
        return self.x.shape[0]

    @property
    def width(self) -> int:
        """d."""
        return self.x.shape[1]

    @property
    def pairs(self) -> int:
        """F, the FFN's key-value pairs; 0 when the FFN runs elsewhere."""
        return 0 if self.key is None else self.key.shape[0]

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def has_memory(self) -> bool:
        return self.visual_key is not None

    @property
    def factored(self) -> bool:
        return self.visual_basis is not None

    @property
    def memories(self) -> int:
        """R, the rows of memory (images)."""
        return 0 if self.visual_key is None else self.visual_key.shape[0]

    @property
    def slots(self) -> int:
        """M."""
        return 0 if self.visual_key is None else self.visual_key.shape[1]

    @property
    def rank(self) -> int:
        """r, the width of a core; 0 when the memory is not factored."""
        return 0 if self.visual_basis is None else self.visual_basis.shape[0]


def narrow(t: Tensor | None) -> Tensor | None:
    """int32 and contiguous; what doesn't fit stays out of range rather than wrap into it."""
    if t is None:
        return None
    return (t if t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).to(torch.int32)).contiguous()


def has_slots(visual_key: Tensor) -> bool:
    """Whether there is a slot to read: a memory without rows or without slots is none."""
    return 0 not in visual_key.shape[:-1]


def _rows(t: Tensor | None, width: int) -> Tensor | None:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), width)


def contain(memory: Mapping[str, Any]) -> Mapping[str, Any]:
    """A factored memory with what is not finite in its basis and positions moved into its cores.

    Products with basis and positions run over all rows and slots, where 0 · NaN of a slot that a row doesn't read would be NaN.
    A core is only multiplied for the rows that read it. A row that reads such a slot becomes NaN as a whole.

    Args:
        memory: visual_key, visual_value, visual_basis, key_position, value_position.

    Returns:
        `memory` itself where everything is known to be finite, which on a GPU would take a synchronization.
    """
    shared = {n: memory[n] for n in ("visual_basis", "key_position", "value_position")}
    given = [t for t in shared.values() if t is not None]
    if known_finite(*given):
        return memory
    # NaN or 0: (M, 1) by slots, (1, 1) of the basis.
    of_key, of_value = (0.0 if p is None else (p * 0).sum(1, keepdim=True) for p in list(shared.values())[1:])
    basis = (shared["visual_basis"] * 0).sum().view(1, 1)
    key, value = memory["visual_key"], memory["visual_value"]
    if key is value:
        key = value = key + (basis + of_key + of_value).to(key.dtype)
    else:
        key, value = key + (basis + of_key).to(key.dtype), value + (basis + of_value).to(value.dtype)
    finite = {n: t if t is None else t.nan_to_num(0.0, 0.0, 0.0) for n, t in shared.items()}
    return {"visual_key": key, "visual_value": value, **finite}


def known_finite(*tensors: Tensor) -> bool:
    """Whether all values are known to be finite; False where looking would synchronize, or nothing is to be seen yet."""
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(bool(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).isfinite()) for t in tensors)


def normalize(
    tensors: Mapping[str, Tensor | None], scalars: Mapping[str, Any], autocast: torch.dtype | None = None
) -> Problem:
    """Checked arguments (and dropout's seed) to a Problem: x as rows, memory as (R, M, ·), empty memory as none.

    A tensor passed as both visual_key and visual_value stays one. Lazy signs are resolved, since kernels read memory by address.
    """
    same = tensors["visual_value"] is tensors["visual_key"]
    tensors = {n: t if t is None else _cast(n, t, autocast) for n, t in tensors.items()}
    x, seed = tensors["x"], tensors.get("seed")
    assert x is not None
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    key_operand, value_operand = tensors.get("key_operand"), tensors.get("value_operand")
    memory = {
        name: tensors[name] for name in ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
    }
    key, value = memory["visual_key"], memory["visual_value"]
    if key is None or value is None or not has_slots(key):
        memory = dict.fromkeys(memory)
        key_operand = value_operand = None
        segments = Segments(rows, 1, rows, shared=True)
        seed = None
    else:
        index, cu_seqlens = narrow(tensors["visual_index"]), narrow(tensors["cu_seqlens"])
        lengths = narrow(tensors["visual_lengths"])
        if index is None and (key.dim() == 2 or (key.shape[0] == 1 and cu_seqlens is None)):
            segments = Segments(rows, 1, rows, lengths=lengths, shared=True)
        else:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            length = x.shape[1] if cu_seqlens is None else None
            segments = Segments(rows, sequences, length, cu_seqlens, index, lengths)
        memory["visual_key"] = key if key.dim() == 3 else key[None]
        memory["visual_value"] = memory["visual_key"] if same else value if value.dim() == 3 else value[None]
        partial = index is not None or cu_seqlens is not None or lengths is not None
        if partial and memory["visual_basis"] is not None and key_operand is None:
            memory = dict(contain(memory))
    return Problem(
        x=x.reshape(rows, width),
        residual=_rows(tensors["residual"], width),
        seed=seed,
        segments=segments,
        key_operand=key_operand,
        value_operand=value_operand,
        **{n: tensors[n] for n in ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")},  # type: ignore[arg-type]
        **memory,  # type: ignore[arg-type]
        **scalars,
    )


def _cast(name: str, t: Tensor, autocast: torch.dtype | None) -> Tensor:
    t = t.resolve_neg()
    return t if autocast is None else t.to(cast_dtype(name, t.dtype, autocast))
