"""The Triton kernels: interpreted on the CPU, or, where there is a GPU, the same tests with the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from memvp_kernels.backends.triton.gemm import override_implementation
from memvp_kernels.backends.triton.runtime import launch

# tests/conftest.py sets TRITON_INTERPRET before anything imports triton; set later it would leave half of triton compiled.
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    from tests.triton.interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialised is NaN here, so a value read before it was written shows."""

    def poison(make: Any) -> Any:
        def allocate(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    """The fused kernels, whatever the cost model would choose for problems as small as the tests'; test_gemm_cublas.py has the others."""
    with override_implementation("fused"):
        yield


@pytest.fixture(params=["descriptors", "pointers"])
def operands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to load a tile; without it a test runs the one that its device and alignment give."""
    if request.param == "pointers":
        monkeypatch.setattr(launch, "has_tma", lambda device: False)
    elif not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    return str(request.param)
