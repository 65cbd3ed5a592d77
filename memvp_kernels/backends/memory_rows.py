"""Products between rows of x and the memory row that each of them reads, in plain PyTorch, without copying what is shared.

The torch backend is written in two such products: `add_product` (each row of `a` times its own matrix) and `outer` (its gradient:
for every memory row the sum over the rows that read it). Which form serves depends on how sequences and memory rows meet:

    Shared    every row reads memory row 0: one dense product
    Padded    sequence s reads row s: one batched product
    Grouped   anything, on a CPU, where reading the index costs no synchronisation: one product per memory row, sequences that share it together
    Gathered  padded with an index, on a GPU: batched products over the gathered memory rows
    Masked    packed, on a GPU: one product per memory row over all rows, the others zeroed
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memvp_kernels.problem import Segments

__all__ = ["Gathered", "Grouped", "Masked", "MemoryRows", "Padded", "Shared", "memory_rows"]


class MemoryRows(Protocol):
    """How rows of x meet rows of memory; a is (N, p), b (N, q), matrices (R, p, q)."""

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        """out[n] += a[n] @ matrices[row of n], for every n that has a row; out (N, q) is contiguous."""

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """(R, p, q): for each memory row the sum of a[n]ᵀ b[n] over the rows n that read it."""

    def row_of(self) -> Tensor | None:
        """(N,) int64, the memory row of each row of x, -1 for none; None when every row has one and it doesn't matter which."""


class Shared:
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        out.addmm_(a, matrices[0])

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.T @ b)[None]

    def row_of(self) -> Tensor | None:
        return None


class Padded:
    def __init__(self, sequences: int, length: int, device: torch.device) -> None:
        self.sequences, self.length, self.device = sequences, length, device

    def _split(self, a: Tensor) -> Tensor:
        return a.reshape(self.sequences, self.length, a.shape[-1])

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        out.view(self.sequences, self.length, out.shape[-1]).baddbmm_(self._split(a), matrices)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        return self._split(a).transpose(1, 2) @ self._split(b)

    def row_of(self) -> Tensor | None:
        return torch.arange(self.sequences, device=self.device).repeat_interleave(self.length)


class Grouped:
    """Reads the index on the host: for tensors on a CPU only."""

    def __init__(self, segments: Segments, memories: int) -> None:
        self.rows, self.memories = segments.rows, memories
        if segments.cu_seqlens is None:
            length = segments.length or 0
            edges = [s * length for s in range(segments.sequences + 1)]
        else:
            edges = [min(max(e, 0), segments.rows) for e in segments.cu_seqlens.tolist()]
        index = list(range(segments.sequences)) if segments.index is None else segments.index.tolist()
        self.spans: dict[int, list[tuple[int, int]]] = {}
        for first, end, row in zip(edges[:-1], edges[1:], index, strict=True):
            if 0 <= row < memories and end > first:
                spans = self.spans.setdefault(row, [])
                if spans and spans[-1][1] == first:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((first, end))

    @staticmethod
    def _take(a: Tensor, spans: list[tuple[int, int]]) -> Tensor:
        return a[slice(*spans[0])] if len(spans) == 1 else torch.cat([a[slice(*s)] for s in spans])

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        for row, spans in self.spans.items():
            if len(spans) == 1:
                out[slice(*spans[0])].addmm_(a[slice(*spans[0])], matrices[row])
                continue
            product = self._take(a, spans) @ matrices[row]
            taken = 0
            for first, end in spans:
                out[first:end] += product[taken : taken + end - first]
                taken += end - first

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_zeros(self.memories, a.shape[-1], b.shape[-1])
        for row, spans in self.spans.items():
            torch.mm(self._take(a, spans).T, self._take(b, spans), out=out[row])
        return out

    def row_of(self) -> Tensor | None:
        rows = torch.full((self.rows,), -1)
        for row, spans in self.spans.items():
            for span in spans:
                rows[slice(*span)] = row
        return rows


class Gathered:
    def __init__(self, segments: Segments, memories: int) -> None:
        assert segments.index is not None and segments.length is not None
        self.sequences, self.length, self.memories = segments.sequences, segments.length, memories
        index = segments.index.long()
        self.present = (index >= 0) & (index < memories)
        self.index = torch.where(self.present, index, -1)

    def _split(self, a: Tensor) -> Tensor:
        return a.reshape(self.sequences, self.length, a.shape[-1])

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        # Absent memory is masked on both sides: whatever row 0 holds, NaN included, must not reach a row that doesn't read it.
        here = self.present[:, None, None]
        gathered = matrices.index_select(0, self.index.clamp(min=0)).masked_fill(~here, 0)
        out.view(self.sequences, self.length, out.shape[-1]).baddbmm_(self._split(a), gathered)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        # A product with the one-hot index sums in a fixed order, where index_add_ on a GPU does not.
        parts = self._split(a).transpose(1, 2) @ self._split(b)
        reads = self.index[None, :] == torch.arange(self.memories, device=a.device)[:, None]
        return (reads.to(a.dtype) @ parts.flatten(1)).view(self.memories, a.shape[-1], b.shape[-1])

    def row_of(self) -> Tensor | None:
        return self.index.repeat_interleave(self.length)


class Masked:
    def __init__(self, segments: Segments, memories: int) -> None:
        assert segments.cu_seqlens is not None
        self.memories = memories
        rows = torch.arange(segments.rows, dtype=torch.int32, device=segments.cu_seqlens.device)
        sequence = torch.searchsorted(segments.cu_seqlens.contiguous(), rows, right=True) - 1
        inside = (sequence >= 0) & (sequence < segments.sequences)
        row = sequence
        if segments.index is not None and segments.sequences:
            row = segments.index.long()[sequence.clamp(0, segments.sequences - 1)]
        self.row = torch.where(inside & (row >= 0) & (row < memories), row, -1)

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        for r in range(self.memories):
            # The product is masked, not its operand: 0 · NaN of another image is NaN.
            out += (a @ matrices[r]).masked_fill_((self.row != r)[:, None], 0)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        masks = [(self.row != r)[:, None] for r in range(self.memories)]
        parts = [a.masked_fill(m, 0).T @ b.masked_fill(m, 0) for m in masks]
        return torch.stack(parts) if parts else a.new_zeros(0, a.shape[-1], b.shape[-1])

    def row_of(self) -> Tensor | None:
        return self.row


def memory_rows(segments: Segments, memories: int, device: torch.device) -> MemoryRows:
    """The form that serves these segments on this device without a synchronisation."""
    if segments.shared:
        return Shared(segments.rows)
    if segments.index is None and segments.length is not None:
        return Padded(segments.sequences, segments.length, device)
    if device.type == "cpu":
        return Grouped(segments, memories)
    if segments.length is not None:
        return Gathered(segments, memories)
    return Masked(segments, memories)
