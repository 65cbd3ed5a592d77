"""Every way to multiply rows by the memory row they read gives what a loop over rows gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memvp_kernels.backends.torch.memory_rows import Blocked, Grouped, MemoryRows, Padded, Shared, memory_rows, row_of
from memvp_kernels.problem import Segments
from tests.cases import DEVICE

pytestmark = pytest.mark.device

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
CROWDED = Segments(rows=12, sequences=4, length=3, index=torch.tensor([3, 3, 3, 3], dtype=torch.int32))
NOBODY = Segments(rows=12, sequences=4, length=3, index=torch.full((4,), -1, dtype=torch.int32))
SHARED = Segments(rows=12, sequences=1, length=12, shared=True)
ANY = [PADDED, INDEXED, OUT_OF_RANGE, PACKED, PACKED_INDEXED, CROWDED, NOBODY]
CPU = torch.device("cpu")


def _blocked(segments: Segments, memories: int) -> MemoryRows:
    return Blocked(segments, memories, DEVICE)


# Each with segments that it serves; built inside the tests, on the device.
FORMS: list[tuple[str, Segments, int, Callable[[Segments, int], MemoryRows]]] = [
    ("shared", SHARED, 1, lambda *_: Shared()),
    ("padded", PADDED, 4, lambda s, _: Padded(s.sequences, s.length or 0)),
    *[(f"blocked{i}", s, 4, _blocked) for i, s in enumerate(ANY)],
    ("more_memories_than_rows", INDEXED, 29, _blocked),
]
ANY_ROWS = {"blocked": _blocked}
if DEVICE.type == "cpu":  # it reads the index on the host
    FORMS += [(f"grouped{i}", s, 4, Grouped) for i, s in enumerate(ANY)]
    ANY_ROWS["grouped"] = Grouped


def on_device(s: Segments) -> Segments:
    return replace(s, **{n: t.to(DEVICE) for n in ("index", "cu_seqlens") if (t := getattr(s, n)) is not None})


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


@pytest.mark.parametrize(("form", "segments", "memories", "make"), FORMS, ids=[f[0] for f in FORMS])
def test_products(form: str, segments: Segments, memories: int, make: Callable[[Segments, int], MemoryRows]) -> None:
    rows = make(on_device(segments), memories)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(DEVICE)

    a, b, out = random(12, 5), random(12, 6), random(12, 6)
    matrices = random(memories, 5, 6)
    wanted = row_by_row(segments, memories)
    start = out.clone()
    rows.add_product(out, a, matrices)
    expected = torch.stack([start[n] + (a[n] @ matrices[r] if r >= 0 else 0) for n, r in enumerate(wanted)])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(rows.product(a, matrices), expected - start)
    outer = torch.zeros(memories, 5, 6, dtype=torch.float64, device=DEVICE)
    for n, r in enumerate(wanted):
        if r >= 0:
            outer[r] += torch.outer(a[n], b[n])
    torch.testing.assert_close(rows.outer((a, b)), outer)
    assert segments.shared or row_of(on_device(segments), memories, DEVICE).tolist() == wanted


@pytest.mark.parametrize("form", list(ANY_ROWS))
@pytest.mark.parametrize("segments", [INDEXED, PACKED_INDEXED], ids=["padded", "packed"])
def test_nan_stays_with_its_memory_and_its_rows(form: str, segments: Segments) -> None:
    rows = ANY_ROWS[form](on_device(segments), 4)
    wanted = torch.tensor(row_by_row(segments, 4))
    a, b, matrices = (torch.randn(*shape).to(DEVICE) for shape in ((12, 5), (12, 6), (4, 5, 6)))
    matrices[[0, 3]] = float("nan")
    out = torch.zeros(12, 6, device=DEVICE)
    rows.add_product(out, a, matrices)
    assert torch.isfinite(out).all(1).tolist() == [r not in (0, 3) for r in wanted.tolist()]
    for spoiled in (0, -1, 2):  # a row of this memory, of none
        reader = int((wanted == spoiled).nonzero()[0]) if (wanted == spoiled).any() else None
        if reader is None:
            continue
        poisoned = b.clone()
        poisoned[reader] = float("nan")
        assert torch.isfinite(rows.outer((a, poisoned))).flatten(1).all(1).tolist() == [r != spoiled for r in range(4)]


def test_a_sum_over_many_blocks_is_rounded_once() -> None:
    """In bfloat16 256 + 1 is 256: the blocks of one memory row, here of one row each, are added in float32."""
    segments = Segments(rows=1024, sequences=512, length=2, index=torch.zeros(512, dtype=torch.int32))
    ones = torch.ones(1024, 1, dtype=torch.bfloat16, device=DEVICE)
    found = _blocked(on_device(segments), 1024).outer((ones, ones))
    assert found[0].item() == 1024
    assert not found[1:].any()


def test_choice_needs_no_synchronization(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert isinstance(memory_rows(SHARED, 1, gpu), Shared)
    assert isinstance(memory_rows(PADDED, 4, gpu), Padded)
    assert isinstance(memory_rows(INDEXED, 4, CPU), Grouped)
    monkeypatch.setattr("memvp_kernels.backends.torch.memory_rows.Blocked", lambda segments, memories, device: device)
    assert memory_rows(INDEXED, 4, gpu) == memory_rows(PACKED, 4, gpu) == gpu


def test_blocks_read_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would synchronize on a GPU: a number taken out of a tensor, or a shape that follows from its values."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("this would wait for the GPU")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    for segments in (PACKED_INDEXED, INDEXED):
        rows = Blocked(segments, 4, CPU)
        rows.add_product(torch.zeros(12, 6), torch.randn(12, 5), torch.randn(4, 5, 6))
        rows.outer((torch.randn(12, 5), torch.randn(12, 6)))


@pytest.mark.gpu
@pytest.mark.parametrize("segments", ANY)
def test_blocks_do_not_wait_for_the_gpu(segments: Segments) -> None:
    """The same numbers there, and PyTorch's synchronization check stays silent."""
    gpu = torch.device("cuda")
    moved = {n: v.to(gpu) for n in ("index", "cu_seqlens") if (v := getattr(segments, n)) is not None}
    a, b, matrices = torch.randn(12, 5), torch.randn(12, 6), torch.randn(4, 5, 6)
    there = [t.to(gpu) for t in (a, b, matrices)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = Blocked(replace(segments, **moved), 4, gpu)
        found = rows.product(there[0], there[2]), rows.outer((there[0], there[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = Blocked(segments, 4, CPU)
    for f, expected in zip(found, (here.product(a, matrices), here.outer((a, b))), strict=True):
        torch.testing.assert_close(f.cpu(), expected)


def test_operands_without_columns_or_rows() -> None:
    """A factored memory of rank 0, and a call without tokens: on a GPU, too, where nothing may be read back."""
    rows = Blocked(on_device(INDEXED), 4, DEVICE)
    none, some = torch.ones(INDEXED.rows, 0, device=DEVICE), torch.ones(INDEXED.rows, 3, device=DEVICE)
    assert torch.equal(rows.product(none, torch.ones(4, 0, 3, device=DEVICE)), torch.zeros_like(some))
    assert rows.outer((none, some)).shape == (4, 0, 3)
    idle = memory_rows(replace(INDEXED, rows=0, length=0), 4, torch.device("cuda"))
    assert idle.product(some[:0], torch.ones(4, 3, 2, device=DEVICE)).shape == (0, 2)
    assert torch.equal(idle.outer((some[:0], some[:0])), torch.zeros(4, 3, 3, device=DEVICE))
