"""PyTorch's threads, of which the suite has one for each of its processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memvp_kernels.backends.torch import products


@pytest.fixture
def two_threads() -> Iterator[None]:
    """A CPU's products choose by whether there are several."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exchanged(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take small matrices for large ones."""
    monkeypatch.setattr(products, "_LARGE", 0)
