"""A driver that says it is active and launches nothing."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CPUDriver(DriverBase):
    def __init__(self) -> None:
        """No library to load."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> Any:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


CPUDriver.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
