"""Activation checkpointing of the language model, under both of transformers' names, without the reentrant kind."""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["ActivationCheckpointing"]

_REENTRANT = (
    "activation checkpointing with use_reentrant=True walks the projector's graph once per layer and fails in the second; "
    'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
)


class ActivationCheckpointing:
    """What a module that holds a ``language_model`` says of that model's activation checkpointing."""

    language_model: Any
    training: bool

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Turn on the language model's activation checkpointing; ``options`` are its own (``every_n_layers``).

        Raises:
            ValueError: ``use_reentrant=True``.
        """
        wanted = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if wanted["use_reentrant"]:
            raise ValueError(_REENTRANT)
        asked_before = bool(getattr(self.language_model, "_require_grads_hooks", None))
        if hasattr(self.language_model, "activation_checkpointing_enable"):
            self.language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=wanted, **options)
        else:  # older transformers know the older name only
            self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=wanted, **options)
        # transformers has the embeddings ask for gradients, which the reentrant kind needs: here that would only send the
        # backward through a first layer below which nothing trains
        if not asked_before:
            self.language_model.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Turn it off."""
        if hasattr(self.language_model, "activation_checkpointing_disable"):
            self.language_model.activation_checkpointing_disable()
        else:
            self.language_model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def _refuse_reentrant_checkpointing(self) -> None:
        """And take the other kind where that was left to PyTorch: ``gradient_checkpointing_enable({})``, PEFT's k-bit training."""
        if not (self.training and torch.is_grad_enabled()):
            return
        modules = self.language_model.modules()
        first = next((m for m in modules if hasattr(m, "gradient_checkpointing")), None)
        if not getattr(first, "gradient_checkpointing", False):
            return
        kind = getattr(getattr(first, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant")
        if kind:
            raise RuntimeError(_REENTRANT)
        if kind is None and not torch.compiler.is_compiling():
            for module in self.language_model.modules():
                function = getattr(module, "_gradient_checkpointing_func", None)
                if isinstance(function, functools.partial):
                    module._gradient_checkpointing_func = functools.partial(function, use_reentrant=False)

    def _refuse_generation_in_training(self) -> None:
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.language_model.modules()):
            raise RuntimeError(
                "generate(): activation checkpointing withholds the cache from layers in training mode, and the tokens come "
                "out wrong; call eval() first"
            )
