"""The language models that can be given memory. A family file knows one shape of transformers layer, and no kernel."""

from __future__ import annotations

from torch import nn

from memvp_kernels.models.patching.families.bart import BART
from memvp_kernels.models.patching.families.family import Family
from memvp_kernels.models.patching.families.llama import LLAMA
from memvp_kernels.models.patching.families.t5 import T5

__all__ = ["FAMILIES", "find_layers", "supported"]

FAMILIES = (LLAMA, T5, BART)


def supported() -> list[str]:
    """The names of the supported models."""
    return list(dict.fromkeys(name for family in FAMILIES for name in family.layers.values()))


def find_layers(language_model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """Every layer of a supported family, with its name, in the order in which they run.

    Raises:
        ValueError: there is none.
    """
    found = [
        (name, module, family)
        for name, module in language_model.named_modules()
        for family in FAMILIES
        if family.owns(module)
    ]
    if not found:
        raise ValueError(
            f"{type(language_model).__name__} has no layer that can be given memory; supported are {', '.join(supported())}"
        )
    return found
