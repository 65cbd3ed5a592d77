"""Products between rows of x and the memory row that each of them reads, in plain PyTorch, without copying what is shared.

The torch backend is written in two such products: `product` (each row of `a` times its own matrix; `add_product` adds it to what is
there) and `outer` (its gradient: for every memory row the sum over the rows that read it). Which form serves depends on how sequences and memory rows meet:

    Shared    every row reads memory row 0: one dense product
    Padded    sequence s reads row s: one batched product
    Grouped   anything, on a CPU, where reading the index costs no synchronization: one product per memory row, sequences that share it together
    Blocked   anything, on a GPU: rows sorted by the memory row they read and cut into blocks of one size, a batched product over these
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from memvp_kernels.backends.torch.products import product
from memvp_kernels.problem import Segments

__all__ = ["Blocked", "Grouped", "MemoryRows", "Padded", "Pair", "Shared", "memory_rows", "row_of"]


Pair: TypeAlias = tuple[Tensor, Tensor]


def _stacked(pairs: Sequence[Pair], dimension: int = 0) -> Pair:
    """The pairs' rows after one another: the product of two such matrices sums over all pairs before it rounds."""
    if len(pairs) == 1:
        return pairs[0]
    lefts, rights = zip(*pairs, strict=True)
    return torch.cat(lefts, dimension), torch.cat(rights, dimension)


class MemoryRows(Protocol):
    """How rows of x meet rows of memory; a is (N, p), b (N, q), matrices (R, p, q)."""

    def product(self, a: Tensor, matrices: Tensor) -> Tensor:
        """(N, q), contiguous: a[n] @ matrices[row of n], zero for an n that has none."""

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        """out[n] += a[n] @ matrices[row of n], for every n that has a row; out (N, q) is contiguous."""

    def plus_product(self, start: Tensor, a: Tensor, matrices: Tensor) -> Tensor:
        """start + product(a, matrices) (N, q), contiguous; zero is added for an n that has no row."""

    def outer(self, *pairs: Pair) -> Tensor:
        """(R, p, q): for each memory row the sum of a[n]ᵀ b[n] over the rows n that read it, and over all pairs."""

    def add_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += outer((a, b)), all of one dtype."""


class Shared:
    def product(self, a: Tensor, matrices: Tensor) -> Tensor:
        return product(a, matrices[0])

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        out.addmm_(a, matrices[0])

    def plus_product(self, start: Tensor, a: Tensor, matrices: Tensor) -> Tensor:
        return product(a, matrices[0], start)

    def outer(self, *pairs: Pair) -> Tensor:
        a, b = _stacked(pairs)
        return (a.T @ b)[None]

    def add_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out[0].addmm_(a.T, b)


class Padded:
    def __init__(self, sequences: int, length: int) -> None:
        self.sequences, self.length = sequences, length

    def _split(self, a: Tensor) -> Tensor:
        return a.reshape(self.sequences, self.length, a.shape[-1])

    def product(self, a: Tensor, matrices: Tensor) -> Tensor:
        return torch.bmm(self._split(a), matrices).flatten(0, 1)

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        out.view(self.sequences, self.length, out.shape[-1]).baddbmm_(self._split(a), matrices)

    def plus_product(self, start: Tensor, a: Tensor, matrices: Tensor) -> Tensor:
        return torch.baddbmm(self._split(start), self._split(a), matrices).flatten(0, 1)

    def outer(self, *pairs: Pair) -> Tensor:
        a, b = _stacked([(self._split(a), self._split(b)) for a, b in pairs], 1)
        return a.transpose(1, 2) @ b

    def add_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out.baddbmm_(self._split(a).transpose(1, 2), self._split(b))


class Grouped:
    """Reads the index on the host: for tensors on a CPU only."""

    def __init__(self, segments: Segments, memories: int) -> None:
        self.memories = memories
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

    def product(self, a: Tensor, matrices: Tensor) -> Tensor:
        out = a.new_zeros(a.shape[0], matrices.shape[-1])
        self.add_product(out, a, matrices)
        return out

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

    def plus_product(self, start: Tensor, a: Tensor, matrices: Tensor) -> Tensor:
        out = start.clone(memory_format=torch.contiguous_format)
        self.add_product(out, a, matrices)
        return out

    def outer(self, *pairs: Pair) -> Tensor:
        a, b = pairs[0]
        out = a.new_zeros(self.memories, a.shape[-1], b.shape[-1])
        for row, spans in self.spans.items():
            left, right = _stacked([(self._take(a, spans), self._take(b, spans)) for a, b in pairs])
            torch.mm(left.T, right, out=out[row])
        return out

    def add_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        for row, spans in self.spans.items():
            out[row].addmm_(self._take(a, spans).T, self._take(b, spans))


class Blocked:
    """Reads no index on the host: every shape follows from N and R.

    Sorted by memory row and cut into tiles of B = N/R rows, the rows of memory row r that lie in tile t are block t + r: at most 2R
    blocks of B rows, however the rows are spread, so at most twice the products that are needed and twice the memory gathered.
    Unused places hold zeros: no row meets another memory row, whose NaN times zero would be NaN.
    """

    def __init__(self, segments: Segments, memories: int, device: torch.device) -> None:
        rows = segments.rows
        self.row = row_of(segments, memories, device)
        absent_last = torch.where(self.row >= 0, self.row, memories)
        order = torch.argsort(absent_last, stable=True)
        memory = torch.arange(memories, device=device)
        edges = torch.searchsorted(absent_last[order], torch.arange(memories + 1, device=device))
        self.size = -(-rows // memories)
        blocks = -(-rows // self.size) + memories
        first = edges[:-1] // self.size + memory  # a memory row's first block; strictly rising
        self.counts = torch.diff(first, append=first.new_full((1,), blocks))
        self.memory = torch.searchsorted(first, torch.arange(blocks, device=device), right=True) - 1
        place = torch.arange(blocks * self.size, device=device)
        taken_by = self.memory.repeat_interleave(self.size)
        rank = place - taken_by * self.size  # among the sorted rows
        self.empty = ((rank < edges[taken_by]) | (rank >= edges[taken_by + 1]))[:, None]
        self.source = order[rank.clamp(0, rows - 1)]
        self.place = torch.empty_like(order)
        self.place[order] = torch.arange(rows, device=device) + absent_last[order].clamp(max=memories - 1) * self.size

    def _blocks(self, a: Tensor) -> Tensor:
        return a[self.source].masked_fill_(self.empty, 0).view(len(self.memory), self.size, a.shape[-1])

    def product(self, a: Tensor, matrices: Tensor) -> Tensor:
        product = torch.bmm(self._blocks(a), matrices[self.memory])
        return product.flatten(0, 1)[self.place].masked_fill_((self.row < 0)[:, None], 0)

    def add_product(self, out: Tensor, a: Tensor, matrices: Tensor) -> None:
        out += self.product(a, matrices)

    def plus_product(self, start: Tensor, a: Tensor, matrices: Tensor) -> Tensor:
        return start + self.product(a, matrices)

    def outer(self, *pairs: Pair) -> Tensor:
        return self._sums(*pairs).to(pairs[0][0].dtype)

    def add_outer(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out += self._sums((a, b))

    def _sums(self, *pairs: Pair) -> Tensor:
        """As `outer`, in float32 at least."""
        a, b = _stacked([(self._blocks(a), self._blocks(b)) for a, b in pairs], 1)
        parts = torch.bmm(a.transpose(1, 2), b).flatten(1)
        wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
        # One thread adds a memory row's blocks in their order, where index_add_ on a GPU uses atomics; `unsafe` spares a look at counts.
        sums = torch.segment_reduce(wide, "sum", lengths=self.counts, unsafe=True)
        return sums.view(len(self.counts), a.shape[-1], b.shape[-1])


def row_of(segments: Segments, memories: int, device: torch.device) -> Tensor:
    """(N,) int64, the memory row of each row of x, -1 for none, without a synchronization."""
    rows = torch.arange(segments.rows, device=device)
    if segments.cu_seqlens is None:
        sequence, inside = rows // (segments.length or 1), None
    else:
        sequence = torch.searchsorted(segments.cu_seqlens.long().contiguous(), rows, right=True) - 1
        inside = (sequence >= 0) & (sequence < segments.sequences)
        sequence = sequence.clamp(0, max(segments.sequences - 1, 0))
    row = sequence
    if segments.index is not None and segments.sequences:
        row = segments.index.long()[sequence]
    reads = (row >= 0) & (row < memories)
    return torch.where(reads if inside is None else reads & inside, row, -1)


def memory_rows(segments: Segments, memories: int, device: torch.device) -> MemoryRows:
    """The form that serves these segments on this device without a synchronization."""
    if segments.shared:
        return Shared()
    if segments.index is None and segments.length is not None:
        return Padded(segments.sequences, segments.length)
    if device.type == "cpu":
        return Grouped(segments, memories)
    if not segments.rows:
        return Grouped(Segments(rows=0, sequences=0, length=0), memories)
    return Blocked(segments, memories, device)
