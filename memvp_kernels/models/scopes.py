"""Blocks of code, in one thread, in which a model's memory is observed or left out, or nothing is dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from memvp_kernels.models.memory.visual_memory import Observer

__all__ = ["Scopes"]


class _Local(threading.local):
    """What the blocks of this thread have set. torch.compile can trace it, but no ContextVar."""

    def __init__(self) -> None:
        self.disabled: tuple[Scopes, ...] = ()
        self.observed: tuple[Scopes, Observer] | None = None
        self.dropout: bool = True


class _NoDropout(TorchFunctionMode):
    """PyTorch's dropout returns its input, in this thread: eval() would turn it off for all."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention and (len(args) > 4 or "dropout_p" in kwargs):
            args, kwargs = (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:]), dict(kwargs)
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)


_local = _Local()


class Scopes:
    """A model's ``with`` blocks."""

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Within it, in this thread, ``observer(layer, x, y)`` is called by every FFN with memory.

        With the FFN's position among those, its input and its output.
        """
        outer, _local.observed = _local.observed, (self, observer)
        try:
            yield
        finally:
            _local.observed = outer

    @contextmanager
    def disable_memory(self) -> Iterator[None]:
        """Within it, in this thread, forward and generate are the language model's own, and images are ignored.

        For reference passes. PEFT's adapters inside the language model stay on; it has ``disable_adapter`` for them.
        """
        outer, _local.disabled = _local.disabled, (*_local.disabled, self)
        try:
            yield
        finally:
            _local.disabled = outer

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Within it, in this thread, a forward drops nothing, whatever mode its modules are in."""
        outer, _local.dropout = _local.dropout, False
        try:
            with _NoDropout():
                yield
        finally:
            _local.dropout = outer

    def _drops(self) -> bool:
        return _local.dropout

    def _observer(self) -> Observer | None:
        observed = _local.observed
        return observed[1] if observed is not None and observed[0] is self else None

    def _is_disabled(self) -> bool:
        return any(model is self for model in _local.disabled)
