"""What every test shares: the device and gpu markers, a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test marked `device` takes its tensors from `tests.cases.DEVICE`: where that is a GPU, it is a gpu test."""
    here = torch.cuda.is_available()
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    for item in items:
        if here and "device" in item.keywords:
            item.add_marker(pytest.mark.gpu)
        if not here and "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def apart() -> Iterator[Any]:
    """Two processes that have not met: what they run sees to that, as under torchrun."""
    from tests.models.parallel.processes import Group

    group = Group(2, meet=False)
    yield group
    group.stop()
