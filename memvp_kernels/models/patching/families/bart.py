"""BART, encoder and decoder: the layer's own forward computes fc2(dropout(activation_fn(fc1(x)))), with biases.

There is no FFN module to patch, so while a memory is bound the layer's three names mean other things: fused, fc1 and
activation_fn pass x on and fc2 computes the whole FFN; opaque, all three run and fc2 adds the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memvp_kernels.models.patching.binding import Binding, bound
from memvp_kernels.models.patching.families.family import Family
from memvp_kernels.models.patching.feed_forward import feed_forward
from memvp_kernels.models.patching.mixins import MemoryFFN, MemoryLayer
from memvp_kernels.models.patching.weights import Matrices, Opaque, QuantizedMatrices, matrices

__all__ = ["BART", "BiasedLayer"]


class BiasedLayer(MemoryLayer, MemoryFFN):
    """In front of an encoder or decoder layer."""

    def memory_ffn(self) -> MemoryFFN:
        """The layer itself."""
        return self

    def ffn_matrices(self) -> Matrices | Opaque:
        """fc1 and fc2."""
        dropout: Any = self.activation_dropout
        if self.training and dropout > 0:
            return Opaque("dropout between its activation and fc2 is on")
        found = matrices(self, key="fc1", value="fc2")
        # fc1 has passed x on by the time fc2 would choose between dequantizing and running as it is
        return Opaque("is quantized") if isinstance(found, QuantizedMatrices) else found

    def ffn_activation(self) -> nn.Module:
        """activation_fn."""
        return self._modules["activation_fn"]  # type: ignore[return-value]

    def _weights(self, binding: Binding) -> Matrices | Opaque:
        """:meth:`ffn_matrices`, looked up once per forward, by the first of the three names that it asks for."""
        if binding.weights is None:
            binding.weights = self.ffn_matrices()
        return binding.weights

    @property
    def fc1(self) -> Callable[[Tensor], Tensor]:
        """x to the hidden activations; fused, x itself."""
        own: Any = self._modules["fc1"]
        binding = bound()
        if binding is None:
            return own
        if not isinstance(self._weights(binding), Opaque):
            return _same

        def remember(x: Tensor) -> Tensor:
            binding.ffn_input = x
            return own(x)

        return remember

    @property
    def activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation; fused, nothing."""
        binding = bound()
        if binding is None or isinstance(self._weights(binding), Opaque):
            return self.ffn_activation()
        return _same

    @property
    def fc2(self) -> Callable[[Tensor], Tensor]:
        """The FFN's output, with memory."""
        own: Any = self._modules["fc2"]
        binding = bound()
        if binding is None:
            return own
        weights = self._weights(binding)

        def with_memory(h: Tensor) -> Tensor:
            x = h if binding.ffn_input is None else binding.ffn_input
            return feed_forward(self, x, binding, weights=weights, own=lambda: own(h))

        return with_memory


def _same(x: Tensor) -> Tensor:
    return x


BART = Family(
    layers={"BartEncoderLayer": "BART", "BartDecoderLayer": "BART"},
    layer_mixin=BiasedLayer,
    ffn_mixin=None,
    ffn_of=lambda layer: layer,
    activation_of=lambda layer: layer._modules["activation_fn"],
)
