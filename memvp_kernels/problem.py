"""The one normalised problem that every backend takes: what :func:`memvp_kernels.fused_ffn` was asked, checked and flattened."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["SHARED", "Problem", "Segments"]

#: What :mod:`memvp_kernels.shared_memory` asks the gradient of, each once for all the calls that read it: float32 at least, summed in place.
SHARED = ("core", "key_operand", "value_operand")


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
    key_operand: Tensor | None = None
    value_operand: Tensor | None = None

    @property
    def core(self) -> Tensor | None:
        """(R, M, r), the key's and the value's in one, of a memory that many calls read."""
        return None if self.key_operand is None else self.visual_key

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
