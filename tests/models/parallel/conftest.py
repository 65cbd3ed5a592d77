"""Groups of processes, one per file and size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models.parallel.processes import Group


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    """Two ranks."""
    group = Group(2)
    yield group
    group.stop()


@pytest.fixture(scope="module")
def four() -> Iterator[Group]:
    """Four ranks."""
    group = Group(4)
    yield group
    group.stop()
