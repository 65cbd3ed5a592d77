"""Blocks of code, in one thread, in which a model's memory is observed or left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from memvp_kernels.models.memory.visual_memory import Observer

__all__ = ["Scopes"]


class _Local(threading.local):
    """What the blocks of this thread have set. torch.compile can trace it, but no ContextVar."""

    def __init__(self) -> None:
        self.disabled: tuple[Scopes, ...] = ()
        self.observed: tuple[Scopes, Observer] | None = None


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

    def _observer(self) -> Observer | None:
        observed = _local.observed
        return observed[1] if observed is not None and observed[0] is self else None

    def _is_disabled(self) -> bool:
        return any(model is self for model in _local.disabled)
