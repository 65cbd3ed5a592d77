"""Every way to multiply rows by the memory row they read gives what a loop over rows gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memvp_kernels.backends.memory_rows import Gathered, Grouped, Masked, MemoryRows, Padded, Shared, memory_rows
from memvp_kernels.problem import Segments

PADDED = Segments(rows=12, sequences=4, length=3)
INDEXED = Segments(rows=12, sequences=4, length=3, index=torch.tensor([2, -1, 2, 0], dtype=torch.int32))
OUT_OF_RANGE = Segments(rows=12, sequences=4, length=3, index=torch.tensor([2, 7, -5, 0], dtype=torch.int32))
PACKED = Segments(rows=12, sequences=4, length=None, cu_seqlens=torch.tensor([0, 5, 5, 11, 12], dtype=torch.int32))
PACKED_INDEXED = Segments(
    rows=12,
    sequences=4,
    length=None,
    cu_seqlens=torch.tensor([0, 5, 5, 9, 10], dtype=torch.int32),  # two rows outside
    index=torch.tensor([1, 0, 1, -1], dtype=torch.int32),
)
PACKED_LIKE_INDEXED = Segments(
    rows=12, sequences=4, length=None, cu_seqlens=torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32), index=INDEXED.index
)
SHARED = Segments(rows=12, sequences=1, length=12, shared=True)

FORMS: list[tuple[str, Segments, int, MemoryRows]] = [
    ("shared", SHARED, 1, Shared(12)),
    ("padded", PADDED, 4, Padded(4, 3, torch.device("cpu"))),
    *[
        (f"grouped{i}", s, 4, Grouped(s, 4))
        for i, s in enumerate([PADDED, INDEXED, OUT_OF_RANGE, PACKED, PACKED_INDEXED])
    ],
    *[(f"gathered{i}", s, 4, Gathered(s, 4)) for i, s in enumerate([INDEXED, OUT_OF_RANGE])],
    *[(f"masked{i}", s, 4, Masked(s, 4)) for i, s in enumerate([PACKED, PACKED_INDEXED, PACKED_LIKE_INDEXED])],
]


def row_by_row(s: Segments, memories: int) -> list[int]:
    rows = []
    for n in range(s.rows):
        if s.shared:
            rows.append(0)
            continue
        if s.cu_seqlens is None:
            sequence: int | None = n // (s.length or 1)
        else:
            edges = s.cu_seqlens.tolist()
            sequence = next((i for i in range(s.sequences) if edges[i] <= n < edges[i + 1]), None)
        row = -1 if sequence is None else sequence if s.index is None else int(s.index[sequence])
        rows.append(row if 0 <= row < memories else -1)
    return rows


@pytest.mark.parametrize(("form", "segments", "memories", "rows"), FORMS, ids=[f[0] for f in FORMS])
def test_products(form: str, segments: Segments, memories: int, rows: MemoryRows) -> None:
    a, b = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    matrices = torch.randn(memories, 5, 6, dtype=torch.float64)
    wanted = row_by_row(segments, memories)
    out = torch.randn(12, 6, dtype=torch.float64)
    start = out.clone()
    rows.add_product(out, a, matrices)
    expected = torch.stack([start[n] + (a[n] @ matrices[r] if r >= 0 else 0) for n, r in enumerate(wanted)])
    torch.testing.assert_close(out, expected)
    outer = torch.zeros(memories, 5, 6, dtype=torch.float64)
    for n, r in enumerate(wanted):
        if r >= 0:
            outer[r] += torch.outer(a[n], b[n])
    torch.testing.assert_close(rows.outer(a, b), outer)
    of = rows.row_of()
    assert of is None or of.tolist() == wanted


@pytest.mark.parametrize("form", [Gathered, Masked, Grouped])
def test_nan_of_another_memory_stays_there(form: type) -> None:
    a, matrices = torch.randn(12, 5), torch.randn(4, 5, 6)
    matrices[0] = float("nan")
    matrices[1] = float("nan")
    out = torch.zeros(12, 6)
    form(PACKED_LIKE_INDEXED if form is Masked else INDEXED, 4).add_product(out, a, matrices)
    clean: Tensor = torch.isfinite(out).all(1)
    assert clean.tolist() == [True] * 9 + [False] * 3


def test_choice_needs_no_synchronisation() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert isinstance(memory_rows(SHARED, 1, gpu), Shared)
    assert isinstance(memory_rows(PADDED, 4, gpu), Padded)
    assert isinstance(memory_rows(INDEXED, 4, cpu), Grouped)
    assert isinstance(memory_rows(INDEXED, 4, gpu), Gathered)
    assert isinstance(memory_rows(PACKED, 4, gpu), Masked)
