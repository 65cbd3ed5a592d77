"""How rows meet the memory row that they read: which way is taken, and what it never does. The products, test_torch_backend.py checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memvp_kernels.backends.torch.memory_rows import Blocked, Grouped, Padded, Shared, memory_rows
from memvp_kernels.problem import Segments
from tests.cases import DEVICE

pytestmark = pytest.mark.device

PADDED = Segments(rows=12, sequences=4, length=3)
INDEXED = Segments(rows=12, sequences=4, length=3, index=torch.tensor([2, -1, 2, 0], dtype=torch.int32))
PACKED = Segments(rows=12, sequences=4, length=None, cu_seqlens=torch.tensor([0, 5, 5, 11, 12], dtype=torch.int32))
PACKED_INDEXED = Segments(
    rows=12,
    sequences=4,
    length=None,
    cu_seqlens=torch.tensor([0, 5, 5, 9, 10], dtype=torch.int32),  # two rows outside
    index=torch.tensor([1, 0, 1, -1], dtype=torch.int32),
)
SHARED = Segments(rows=12, sequences=1, length=12, shared=True)
CPU = torch.device("cpu")


def on_device(s: Segments) -> Segments:
    return replace(s, **{n: t.to(DEVICE) for n in ("index", "cu_seqlens") if (t := getattr(s, n)) is not None})


def test_a_sum_over_many_blocks_is_rounded_once() -> None:
    """In bfloat16 256 + 1 is 256: the blocks of one memory row, here of one row each, are added in float32."""
    segments = Segments(rows=1024, sequences=512, length=2, index=torch.zeros(512, dtype=torch.int32))
    ones = torch.ones(1024, 1, dtype=torch.bfloat16, device=DEVICE)
    found = Blocked(on_device(segments), 1024, DEVICE).outer((ones, ones))
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


def test_operands_without_columns_or_rows() -> None:
    """A factored memory of rank 0, and a call without tokens: on a GPU, too, where nothing may be read back."""
    rows = Blocked(on_device(INDEXED), 4, DEVICE)
    none, some = torch.ones(INDEXED.rows, 0, device=DEVICE), torch.ones(INDEXED.rows, 3, device=DEVICE)
    assert torch.equal(rows.product(none, torch.ones(4, 0, 3, device=DEVICE)), torch.zeros_like(some))
    assert rows.outer((none, some)).shape == (4, 0, 3)
    idle = memory_rows(replace(INDEXED, rows=0, length=0), 4, torch.device("cuda"))
    assert idle.product(some[:0], torch.ones(4, 3, 2, device=DEVICE)).shape == (0, 2)
    assert torch.equal(idle.outer((some[:0], some[:0])), torch.zeros(4, 3, 3, device=DEVICE))
