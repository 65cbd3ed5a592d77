"""BART, encoder and decoder: the layer's own forward computes fc2(dropout(activation_fn(fc1(x)))), with biases.

There is no FFN module to stand in front of. While a memory is bound, the three names of the layer mean other things:
fused, fc1 and activation_fn pass x on and fc2 computes the whole FFN; opaque, all three run and fc2 adds the memory.
So the forward that transformers wrote stays in charge of attention, residuals, dropout, norms and fp16 clamping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memvp_kernels.models.patching.families.family import Family
from memvp_kernels.models.patching.mixins import MemoryFFN, MemoryLayer, feed_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque, Packed, matrices

__all__ = ["BART", "BiasedLayer"]


class BiasedLayer(MemoryLayer, MemoryFFN):
    """In front of an encoder or decoder layer."""

    _ffn_input: Tensor | None = None
    _ffn_weights: Matrices | Opaque | None = None

    def memory_ffn(self) -> MemoryFFN:
        """The layer itself."""
        return self

    def ffn_matrices(self) -> Matrices | Opaque:
        """fc1 and fc2."""
        dropout: Any = self.activation_dropout
        if self.training and dropout > 0:
            return Opaque("dropout between its activation and fc2 is on")
        found = matrices(self, key="fc1", value="fc2")
        # fc1 has passed x on by the time fc2 would choose between restoring and running as it is
        return Opaque("is quantised") if isinstance(found, Packed) else found

    def ffn_activation(self) -> nn.Module:
        """activation_fn."""
        return self._modules["activation_fn"]  # type: ignore[return-value]

    def _weights(self) -> Matrices | Opaque:
        """:meth:`ffn_matrices`, looked up by the first of the three names that this forward asks for."""
        if self._ffn_weights is None:
            self._ffn_weights = self.ffn_matrices()
        return self._ffn_weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, after which nothing of it is kept."""
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._ffn_weights = None

    @property
    def fc1(self) -> Callable[[Tensor], Tensor]:
        """x to the hidden activations; fused, x itself."""
        own: Any = self._modules["fc1"]
        if self.memory is None:
            return own
        if not isinstance(self._weights(), Opaque):
            return _same

        def remember(x: Tensor) -> Tensor:
            self._ffn_input = x
            return own(x)

        return remember

    @property
    def activation_fn(self) -> Callable[[Tensor], Tensor]:
        """The activation; fused, nothing."""
        if self.memory is None or isinstance(self._weights(), Opaque):
            return self.ffn_activation()
        return _same

    @property
    def fc2(self) -> Callable[[Tensor], Tensor]:
        """The FFN's output, with memory."""
        own: Any = self._modules["fc2"]
        if self.memory is None:
            return own
        weights = self._weights()

        def with_memory(h: Tensor) -> Tensor:
            remembered, self._ffn_input = self._ffn_input, None
            x = h if remembered is None else remembered
            return feed_forward(self, x, weights=weights, own=lambda: own(h))

        return with_memory


def _same(x: Tensor) -> Tensor:
    return x


BART = Family(
    layers={"BartEncoderLayer": "BART", "BartDecoderLayer": "BART"},
    layer_mixin=BiasedLayer,
    ffn_mixin=None,
    ffn_of=lambda layer: layer,
)
