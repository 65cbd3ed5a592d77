"""Which launches are chained: on the chips and with the drivers that can, and never interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memvp_kernels.backends.triton.device import pdl as chain
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.runtime import launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    chain._captures.cache_clear()
    yield
    chain._captures.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "driver", "interpreted", "chains"),
    [
        (90, 12_030, False, True),
        (100, 13_000, False, True),
        (103, None, False, True),  # compiled on a machine without a driver
        (90, 12_020, False, False),
        (80, 13_000, False, False),
        (120, 13_000, False, False),
        (90, 13_000, True, False),
    ],
)
def test_who_is_chained(
    architecture: int, driver: int | None, interpreted: bool, chains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: architecture)
    monkeypatch.setattr(launch, "interpreted", lambda: interpreted)
    if driver is not None:
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    else:
        monkeypatch.delattr(torch._C, "_cuda_getDriverVersion", raising=False)
    assert chain.chained(CPU) == ({"CHAINED": True, "launch_pdl": True} if chains else {"CHAINED": False})


def test_the_model_prices_what_is_launched() -> None:
    for architecture in (80, 86, 89, 90, 100, 103, 120, 121):
        chip = tiles.chip_of(architecture)
        assert chip.chains == (architecture in (90, 100, 103))
        assert tiles.launch_cycles(chip) == pytest.approx((1e-6 if chip.chains else 2e-6) * chip.clock * 1e9)
