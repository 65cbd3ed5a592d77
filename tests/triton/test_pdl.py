"""Which launches use PDL: those on chips and with drivers that can, and none in the interpreter."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from memvp_kernels.backends.triton.runtime import launch, pdl

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    pdl._driver_captures.cache_clear()
    yield
    pdl._driver_captures.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "driver", "interpreted", "expected"),
    [
        (90, 12_030, False, True),
        (100, 13_000, False, True),
        (103, None, False, True),  # compiled on a machine without a driver
        (120, 13_000, False, False),
        (121, 13_000, False, False),
        (90, 12_020, False, False),
        (80, 13_000, False, False),
        (89, 13_000, False, False),
        (90, 13_000, True, False),
    ],
)
def test_who_uses_it(
    architecture: int, driver: int | None, interpreted: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(name: str) -> Any:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")

        def get_version(pointer: Any) -> int:
            pointer._obj.value = driver
            return 0

        return types.SimpleNamespace(cuDriverGetVersion=get_version)

    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(launch, "interpreted", lambda: interpreted)
    assert pdl.pdl_options(CPU) == ({"PDL": True, "launch_pdl": True} if expected else {"PDL": False})
    assert pdl._driver_version() == driver
