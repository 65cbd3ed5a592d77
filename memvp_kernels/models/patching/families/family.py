"""What a family of language models is to this package: which layers it has, and where their FFN is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from memvp_kernels.models.patching.patch import Patch

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """One shape of layer, whichever models have it.

    Attributes:
        layers: class name of a transformers layer → the name under which its models are known.
        layer_mixin: goes in front of the layer.
        ffn_mixin: goes in front of its FFN; None: the layer computes its FFN itself.
        ffn_of: the FFN of a layer.
        activation_of: the activation function of an FFN.
    """

    layers: Mapping[str, str]
    layer_mixin: type[Patch]
    ffn_mixin: type[Patch] | None
    ffn_of: Callable[[Any], nn.Module]
    activation_of: Callable[[Any], Any]

    def owns(self, module: nn.Module) -> bool:
        """Whether ``module`` is a layer of this family, or of a class derived from one (sharded, patched)."""
        return any(
            kind.__name__ in self.layers and kind.__module__.startswith("transformers.models.")
            for kind in type(module).__mro__
        )
