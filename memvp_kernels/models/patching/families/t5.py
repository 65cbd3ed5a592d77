"""T5 and mT5, encoder and decoder: the FFN is ``layer[-1].DenseReluDense``, plain (v1.0) or gated (v1.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memvp_kernels.models.patching.binding import bound
from memvp_kernels.models.patching.families.family import Family
from memvp_kernels.models.patching.feed_forward import feed_forward
from memvp_kernels.models.patching.mixins import MemoryFFN, MemoryLayer
from memvp_kernels.models.patching.patch import replaced_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque, QuantizedMatrices, matrices

__all__ = ["T5", "DenseActDense", "T5Layer"]


class DenseActDense(MemoryFFN):
    """In front of ``DenseReluDense``; layer norm, residual dropout and fp16 clamping stay around it."""

    def ffn_matrices(self) -> Matrices | QuantizedMatrices | Opaque:
        """wi (plain) or wi_0 and wi_1 (gated), and wo."""
        dropout: Any = self.dropout
        if dropout.training and dropout.p > 0:
            return Opaque("dropout between its activation and wo is on")
        if "wi_0" in self._modules:
            return matrices(self, key="wi_1", value="wo", gate="wi_0")
        return matrices(self, key="wi", value="wo")

    def ffn_activation(self) -> nn.Module:
        """act."""
        return self.act  # type: ignore[return-value]

    def forward(self, hidden_states: Tensor) -> Any:
        """(S, T, d) to (S, T, d)."""
        own, binding = replaced_forward(self) or super().forward, bound()
        if binding is None:
            return own(hidden_states)
        return feed_forward(self, hidden_states, binding, weights=self.ffn_matrices(), own=lambda: own(hidden_states))


class T5Layer(MemoryLayer):
    """In front of the block."""

    def memory_ffn(self) -> MemoryFFN:
        """layer[-1].DenseReluDense."""
        return _ffn_of(self)  # type: ignore[return-value]


def _ffn_of(block: Any) -> nn.Module:
    return block.layer[-1].DenseReluDense


T5 = Family(
    layers={"T5Block": "T5", "MT5Block": "mT5"},
    layer_mixin=T5Layer,
    ffn_mixin=DenseActDense,
    ffn_of=_ffn_of,
    activation_of=lambda ffn: ffn.act,
)
