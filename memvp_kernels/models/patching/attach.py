"""Give one language model the mixins of its family, and take them away again."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.offloading import execution_device
from memvp_kernels.models.patching.families import find_layers
from memvp_kernels.models.patching.feed_forward import log_opaque
from memvp_kernels.models.patching.mixins import MemoryFFN, MemoryLanguageModel, MemoryLayer
from memvp_kernels.models.patching.patch import (
    give_forward,
    is_patched,
    keeps_its_forward,
    patch,
    take_forward,
    unpatch,
)
from memvp_kernels.models.patching.weights import Opaque, activation_name

__all__ = [
    "Attachment",
    "attach",
    "check_all_read",
    "detach",
    "hidden_dtype",
    "memory_ffns",
    "transformers_model",
    "uses_peft",
]


_MIXINS = (MemoryLanguageModel, MemoryLayer, MemoryFFN)


class Attachment(NamedTuple):
    """What was found and changed.

    Attributes:
        width: d.
        layers: indices of the layers that were given memory.
        device: where the first layer computes.
        frozen: names of the parameters that were trainable before.
    """

    width: int
    layers: tuple[int, ...]
    device: torch.device
    frozen: tuple[str, ...]


def attach(language_model: nn.Module, config: MemVPConfig) -> Attachment:
    """Patch the layers and FFNs of ``language_model`` and freeze it. Where anything is wrong, nothing is changed.

    A model that PEFT has prepared is frozen already, and what PEFT left trainable stays so.

    Raises:
        TypeError: not a module.
        ValueError: no supported layer, memory attached already, an unknown layer index, an activation that the operator
            does not compute, or a forward set on an instance, which would run instead of the one with memory.
    """
    if not isinstance(language_model, nn.Module):
        raise TypeError(
            f"language_model: wanted a transformers model, got {language_model!r:.80} ({type(language_model).__name__}); "
            "load one first, as with AutoModelForCausalLM.from_pretrained(…)"
        )
    layers = find_layers(language_model)
    if any(isinstance(module, _MIXINS) for module in language_model.modules()):
        raise ValueError("this language model has memory already; call unload() on its MemVPModel first")
    top = transformers_model(language_model)
    chosen = config.chosen_layers(len(layers))
    for name, layer, family in layers:
        ffn = family.ffn_of(layer)
        # a forward on an FFN instance (a patching library's) is called, but not one inside an accelerate hook
        for module in (layer, ffn) if "_old_forward" in vars(ffn) else (layer,):
            if not keeps_its_forward(module):
                raise ValueError(
                    f"{name}: a forward was set on this {type(module).__name__} instance ({vars(module)['forward']!r}), "
                    "and would run without the memory. Wrap the model before whatever set it"
                )
        function = family.activation_of(ffn)
        if activation_name(function) is None:
            raise ValueError(
                f"{name}: its activation {type(function).__name__} is not one that the memory can use; known are relu, "
                "gelu, its tanh approximations and silu"
            )

    for number, (_, layer, family) in enumerate(layers):
        ffn = family.ffn_of(layer)
        if family.ffn_mixin is not None and not is_patched(ffn):  # layers may share one FFN
            take_forward(ffn)
            patch(ffn, family.ffn_mixin)
        patch(layer, family.layer_mixin)
        layer.memory_layer = chosen.index(number) if number in chosen else None  # type: ignore[assignment]
    patch(top, MemoryLanguageModel)
    _log_opaque(language_model)

    frozen: tuple[str, ...] = ()
    if not uses_peft(language_model):
        frozen = tuple(name for name, p in language_model.named_parameters() if p.requires_grad)
        language_model.requires_grad_(False)
    return Attachment(width=_width(top), layers=chosen, device=execution_device(layers[0][1]), frozen=frozen)


def detach(language_model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Undo :func:`attach`, down to the attributes of the instances.

    Raises:
        RuntimeError: something else has changed a class since; nothing is undone then.
    """
    ours = [module for module in language_model.modules() if isinstance(module, _MIXINS)]
    for module in sorted(ours, key=is_patched):  # a class that cannot be taken away raises before any is
        unpatch(module)
        vars(module).pop("memory_layer", None)
        give_forward(module)
    for name, parameter in language_model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)


def check_all_read(language_model: nn.Module, memory: Memory, layers: int) -> None:
    """Check that no layer lost the memory to a forward that replaced its own.

    A layer may rightly not run at all: layer dropout, an encoder whose outputs were given.

    Raises:
        RuntimeError: one did.
    """
    readers = memory.readers
    unread = [] if readers is None else [layer for layer in range(layers) if readers.lacks(layer)]
    if not unread:
        return
    found = {layer.memory_layer: (name, layer) for name, layer in memory_layers(language_model)}
    for number in unread:
        name, layer = found.get(number, (f"layer {number} of those with memory", None))
        if layer is None or not keeps_its_forward(layer):
            raise RuntimeError(
                f"{name} ran without the image, because something replaced it, or its forward, after the model was "
                "wrapped; call unload(), and wrap the model with MemVPModel after whatever replaces layers"
            )


def memory_layers(language_model: nn.Module) -> list[tuple[str, MemoryLayer]]:
    """The layers that have memory, with their names, in the order in which they run; none once detached."""
    return [
        (name, module)
        for name, module in language_model.named_modules()
        if isinstance(module, MemoryLayer) and module.memory_layer is not None
    ]


def memory_ffns(language_model: nn.Module) -> list[tuple[str, MemoryFFN]]:
    """The FFNs of :func:`memory_layers`, with their names."""
    names = {module: name for name, module in language_model.named_modules() if isinstance(module, MemoryFFN)}
    ffns = (layer.memory_ffn() for _, layer in memory_layers(language_model))
    return [(names[ffn], ffn) for ffn in ffns if ffn in names]


def uses_peft(language_model: nn.Module) -> bool:
    """Whether PEFT has put an adapter into the model, and so decided what is trainable."""
    return any(
        bool(getattr(module, "peft_config", None)) for module in (language_model, transformers_model(language_model))
    )


def transformers_model(language_model: nn.Module) -> nn.Module:
    """The transformers model itself, inside whatever wraps it."""
    from transformers import PreTrainedModel

    for module in language_model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(language_model).__name__} holds no transformers PreTrainedModel")


def _width(top: Any) -> int:
    return int(top.config.get_text_config(decoder=True).hidden_size)


def hidden_dtype(language_model: nn.Module) -> torch.dtype:
    """Of the hidden states, at this moment, as a norm's weight tells it (the weights may be integers)."""
    layer = next((module for module in language_model.modules() if isinstance(module, MemoryLayer)), None)
    norms = (p for p in layer.parameters() if p.dim() == 1 and p.is_floating_point()) if layer is not None else iter(())
    norm = next(norms, None)
    return torch.float32 if norm is None else norm.dtype


def _log_opaque(language_model: nn.Module) -> None:
    reasons: Counter[str] = Counter()
    for _, ffn in memory_ffns(language_model):
        found = ffn.ffn_matrices()
        if isinstance(found, Opaque):
            reasons[found.reason] += 1
    for reason in reasons:
        log_opaque(reason)
