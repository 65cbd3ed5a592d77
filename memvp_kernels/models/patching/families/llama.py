"""Decoders with the gated FFN down(act(gate(x)) ⊙ up(x)) in a submodule ``mlp``: LLaMA and its relatives."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memvp_kernels.models.patching.binding import bound
from memvp_kernels.models.patching.families.family import Family
from memvp_kernels.models.patching.feed_forward import feed_forward
from memvp_kernels.models.patching.mixins import MemoryFFN, MemoryLayer
from memvp_kernels.models.patching.patch import replaced_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque, QuantizedMatrices, matrices

__all__ = ["LLAMA", "GatedLayer", "GatedMLP"]


class GatedMLP(MemoryFFN):
    """In front of ``mlp``."""

    def ffn_matrices(self) -> Matrices | QuantizedMatrices | Opaque:
        """gate_proj, up_proj and down_proj."""
        return matrices(self, key="up_proj", value="down_proj", gate="gate_proj")

    def ffn_activation(self) -> nn.Module:
        """act_fn."""
        return _activation_of(self)

    def forward(self, x: Tensor) -> Any:
        """x (S, T, d) to (S, T, d)."""
        own, binding = replaced_forward(self) or super().forward, bound()
        if binding is None:
            return own(x)
        return feed_forward(self, x, binding, weights=self.ffn_matrices(), own=lambda: own(x))


class GatedLayer(MemoryLayer):
    """In front of the decoder layer."""

    def memory_ffn(self) -> MemoryFFN:
        """mlp."""
        return _ffn_of(self)  # type: ignore[return-value]


def _ffn_of(layer: Any) -> nn.Module:
    return layer.mlp


def _activation_of(ffn: Any) -> Any:
    """act_fn; a library's class for this FFN may know it from the configuration alone."""
    found = getattr(ffn, "act_fn", None)
    if found is None and hasattr(ffn, "config"):
        from transformers.activations import ACT2FN

        found = ACT2FN[getattr(ffn.config, "hidden_activation", None) or ffn.config.hidden_act]
    return found


LLAMA = Family(
    layers={
        "LlamaDecoderLayer": "LLaMA",
        "MistralDecoderLayer": "Mistral",
        "Qwen2DecoderLayer": "Qwen2",
        "Qwen3DecoderLayer": "Qwen3",
        "GemmaDecoderLayer": "Gemma",
        "Gemma2DecoderLayer": "Gemma 2",
        "Gemma3DecoderLayer": "Gemma 3",
    },
    layer_mixin=GatedLayer,
    ffn_mixin=GatedMLP,
    ffn_of=_ffn_of,
    activation_of=_activation_of,
)
