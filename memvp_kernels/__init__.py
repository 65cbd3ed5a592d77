"""Fused kernels for memory-space visual prompting: an image becomes slots of the FFN's key-value memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memvp_kernels.ffn import fused_ffn
from memvp_kernels.version import __version__

if TYPE_CHECKING:
    from memvp_kernels.models import MemVPConfig, MemVPModel

__all__ = ["MemVPConfig", "MemVPModel", "__version__", "fused_ffn"]


def __getattr__(name: str) -> Any:
    """The model layer needs transformers; the operator doesn't, so the models load on first use."""
    if name in ("MemVPConfig", "MemVPModel"):
        from memvp_kernels import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
