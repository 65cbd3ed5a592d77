"""Assisted decoding: a draft model reads a memory of its own, or none, and never the one of the model that it drafts for."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["DraftModel"]

_OURS = ("visual_memory", "memory_index")
_PREPARE = (
    "_maybe_prepare_encoder_kwargs_for_generation",
    "_prepare_encoder_decoder_kwargs_for_generation",
)  # until 5.17


class DraftModel:
    """A draft model as transformers' candidate generators call it, which give it a copy of all the target's arguments.

    Args:
        model: the draft.
        **memory: the arguments by which it reads the images; none for an ordinary model.
    """

    def __init__(self, model: Any, **memory: Any) -> None:
        self._model = model
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._prepare, name) if name in _PREPARE else getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The draft's."""
        return self._model.generate(*args, **self._own(kwargs))

    def _prepare(
        self, name: str, inputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """An encoder-decoder's draft runs its own encoder first."""
        prepared: dict[str, Any] = getattr(self._model, name)(inputs, self._own(model_kwargs), *args, **kwargs)
        return prepared

    def _own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name not in _OURS} | self._memory
