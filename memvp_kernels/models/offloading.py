"""Modules whose parameters accelerate keeps elsewhere and fetches for one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["execution_device", "fetch"]


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: an offloaded parameter is on no device until its hook fetches it."""
    parameter = next(module.parameters())
    if parameter.device.type != "meta":
        return parameter.device
    devices = (getattr(vars(m).get("_hf_hook"), "execution_device", None) for m in module.modules())
    return torch.device(next((device for device in devices if device is not None), "cpu"))


def fetch(module: nn.Module) -> None:
    """Take ``module`` out of accelerate's offloading, onto the device where it computes; for what trains or is read in parts."""
    if not any(parameter.device.type == "meta" for parameter in module.parameters()):
        return
    device = execution_device(module)
    hooked: list[Any] = [child for child in module.modules() if "_hf_hook" in vars(child)]
    if hooked:
        from accelerate.hooks import remove_hook_from_module

        for child in hooked:
            remove_hook_from_module(child)
        module.to(device)
