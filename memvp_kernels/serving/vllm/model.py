"""vLLM's own model classes with a memory in their FFNs, made when vLLM asks for one by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN
from vllm import ModelRegistry
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY

from memvp_kernels.models.patching.weights import activation_name
from memvp_kernels.serving.vllm import compat
from memvp_kernels.serving.vllm.ffn import give_memory
from memvp_kernels.serving.vllm.folder import ARCHITECTURES, ServedFolder
from memvp_kernels.serving.vllm.memory import EngineMemory, ImageEncoder
from memvp_kernels.serving.vllm.processor import DummyInputs, ProcessingInfo, Processor
from memvp_kernels.serving.vllm.state import BoundByBlock, RequestState


class MemVP:
    """In front of one of vLLM's decoders: its FFNs get a memory, its inputs an image that is no token."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        compat.check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        model_config = vllm_config.model_config
        folder = ServedFolder.of(model_config.model)
        layers = folder.config.chosen_layers(len(self.model.layers))  # type: ignore[attr-defined]
        device = torch.device(vllm_config.device_config.device)
        self._encoder = ImageEncoder(
            folder, width=model_config.get_hidden_size(), layers=len(layers), dtype=model_config.dtype, device=device
        )
        self.engine_memory = EngineMemory(self._encoder, vllm_config.scheduler_config.max_num_seqs, device)
        self._by_block = None if vllm_config.use_v2_model_runner else BoundByBlock(self.engine_memory)
        for position, layer in enumerate(layers):
            ffn, name = self.model.layers[layer].mlp, f"{prefix}model.layers.{layer}.mlp"  # type: ignore[attr-defined]
            give_memory(ffn, self.engine_memory, position, _activation(self.config), name, vllm_config)  # type: ignore[attr-defined]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """An image adds nothing to the prompt."""
        return None

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's hook of runner V2."""
        return RequestState

    def get_language_model(self) -> Any:
        """vLLM's hook: the part that embeds and generates text is all of it."""
        return self

    def embed_multimodal(self, **images: Any) -> list[Tensor]:
        """vLLM's hook: each image's core as one row (1, M · r), which its encoder cache keeps."""
        return [core.reshape(1, -1) for core in self._encoder.encode(**images)]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None, **_: Any
    ) -> Tensor:
        """vLLM's hook: text alone is embedded; cores are not part of the input."""
        if self._by_block is not None and multimodal_embeddings is not None and is_multimodal is not None:
            self._by_block.encoded(is_multimodal, list(multimodal_embeddings))
        embedded: Tensor = self.model.embed_input_ids(input_ids)  # type: ignore[attr-defined]
        return embedded

    def forward(self, input_ids: Any, positions: Tensor, *arguments: Any, **options: Any) -> Any:
        """vLLM's forward."""
        if self._by_block is not None:
            self._by_block.bind(positions, get_forward_context().attn_metadata)
        return super().forward(input_ids, positions, *arguments, **options)  # type: ignore[misc]


def _activation(config: Any) -> str:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    found = activation_name(ACT2FN[name])
    if found is None:
        raise ValueError(f"hidden_act: wanted an activation that fused_ffn computes, got {name!r}")
    return found


def __getattr__(name: str) -> Any:
    """``MemVPLlamaForCausalLM`` and its relatives."""
    base = next((theirs for theirs, ours in ARCHITECTURES.items() if ours == name), None)
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = type(
        name, (MemVP, ModelRegistry.models[base].load_model_cls(), SupportsMultiModal), {"__module__": __name__}
    )
    register = MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
    globals()[name] = register(kind)
    return globals()[name]
