"""Methods that run a model which ``fully_shard`` has cut up: FSDP2 knows of ``forward`` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

__all__ = ["gather", "like_forward"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


def like_forward(method: _Method) -> _Method:
    """Mark a method of a module as one that runs it: a sharded root's own parameters are gathered around the call."""

    @functools.wraps(method)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = method.__name__
        if name in vars(self) or not _is_sharded(self):
            return method(self, *args, **kwargs)
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(self, name)  # leaves a method of that name on the instance
        return getattr(self, name)(*args, **kwargs)

    return called  # type: ignore[return-value]


def gather(model: nn.Module, module: nn.Module) -> None:
    """Gather a part of ``model`` that is about to run before the forward of whatever ``fully_shard`` has put it in."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    owners: list[Any] = [owner for owner in model.modules() if _is_sharded(owner)]
    owners = [owner for owner in owners if any(part is module for part in owner.modules())]
    if owners and module is not owners[-1]:
        owners[-1].unshard()


def _is_sharded(module: nn.Module) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
