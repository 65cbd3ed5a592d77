"""The mixins that carry memory through a language model to its FFNs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.patching.binding import Binding, swap
from memvp_kernels.models.patching.patch import Patch
from memvp_kernels.models.patching.weights import Matrices, Opaque, QuantizedMatrices

__all__ = ["MemoryFFN", "MemoryLanguageModel", "MemoryLayer"]


class MemoryLanguageModel(Patch):
    """In front of a language model: generate() lets two more arguments through to the layers.

    ``visual_memory`` is a tuple, which generate() passes on untouched. ``memory_index`` is a tensor, which it repeats for
    beams and returned sequences, so that no memory row is copied. Where nothing is repeated there is no index, and every
    decoded token takes the batched product that needs none.
    """

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        ours = ("visual_memory", "memory_index")
        kept = {name: model_kwargs.pop(name) for name in ours if name in model_kwargs}
        try:
            super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]
        finally:
            model_kwargs.update(kept)

    def generate_batch(self, *args: Any, visual_memory: Memory | None = None, **kwargs: Any) -> Any:
        """Continuous batching, which ``cache_implementation="paged"`` asks for as well; without memory alone."""
        if visual_memory is not None:
            raise NotImplementedError(
                "continuous batching (generate_batch, or a paged cache) packs requests into one row and has no image per "
                "request; use another cache_implementation, or the vLLM plug-in for serving"
            )
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        memory: Memory | None = kwargs.get("visual_memory")
        if expand_size > 1 and memory is not None and kwargs.get("memory_index") is None:
            rows = memory.core.shape[0]
            kwargs["memory_index"] = torch.arange(rows, dtype=torch.int32, device=memory.core.device)
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )


class MemoryFFN(Patch):
    """In front of an FFN: with a memory bound, it computes the FFN and its memory in one."""

    def ffn_matrices(self) -> Matrices | QuantizedMatrices | Opaque:
        """The FFN's matrices at this moment."""
        raise NotImplementedError

    def ffn_activation(self) -> nn.Module:
        """The FFN's activation function."""
        raise NotImplementedError


class MemoryLayer(Patch):
    """In front of a layer: keeps the memory from the attention and binds it for the layer's FFN.

    Attributes:
        memory_layer: position among the layers that have memory; None: this one has none.
    """

    memory_layer: int | None = None

    def memory_ffn(self) -> MemoryFFN:
        """The part of this layer that computes its FFN."""
        raise NotImplementedError

    def forward(
        self, *args: Any, visual_memory: Memory | None = None, memory_index: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The layer's own forward, its FFN with memory."""
        layer, binding = self.memory_layer, None
        if visual_memory is not None and layer is not None:
            binding = Binding(visual_memory, memory_index, layer)
        outer = swap(binding)
        try:
            out = super().forward(*args, **kwargs)
        finally:
            swap(outer)
        if binding is not None and not binding.used:
            raise RuntimeError(
                f"{type(self).__name__}: its feed-forward layer ran without the image, because something replaced that "
                "layer, or its forward, after the model was wrapped; do that first (a patching library) and wrap the "
                "model with MemVPModel afterwards"
            )
        return out
