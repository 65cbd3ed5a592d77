"""MemVPModel itself around the stack's weights: what a user runs, transformers' forward and all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.memory import tensor_bytes
from harness.operands import Adapter
from harness.stack import FixedCache, Stack

__all__ = ["NAME", "Product"]

NAME = "MemVPModel"

_PARAMETERS = {
    "fc1_weight": "projector.fc1.weight",
    "fc1_bias": "projector.fc1.bias",
    "fc2_weight": "projector.fc2.weight",
    "fc2_bias": "projector.fc2.bias",
    "key_position": "key_position",
    "value_position": "value_position",
}


class Product:
    """A MemVPModel on a LlamaForCausalLM that shares the stack's tensors, with the adapter's values.

    Args:
        stack: the base.
        adapter: copied, so that training one leaves the other alone.
        recompute, checkpointing: of the model.
        prepare: changes the language model before it gets memory.
    """

    def __init__(
        self,
        stack: Stack,
        adapter: Adapter,
        *,
        recompute: bool = False,
        checkpointing: bool = False,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> None:
        from memvp_kernels import MemVPConfig, MemVPModel

        config = MemVPConfig(
            vision_dim=stack.preset.vision_width,
            projector_dim=stack.preset.projector_width,
            num_slots=adapter.key_position.shape[0],
            feature_scale=1.0,  # the adapter's own scales, see there
            memory_scale=adapter.scale,
        )
        base = _language_model(stack)
        if prepare is not None:
            prepare(base)
        self.model = MemVPModel(base, config, recompute=recompute)
        if checkpointing:
            self.model.activation_checkpointing_enable()
        with torch.no_grad():
            for name, own in _PARAMETERS.items():
                self.model.memory.get_parameter(own).copy_(adapter.get_parameter(name))

    @property
    def bytes(self) -> int:
        """Bytes of the language model's weights, of packed ones with what restores them."""
        states = [getattr(p, "quant_state", None) for p in self.model.language_model.parameters()]
        packed = [state.absmax for state in states if state is not None]
        return tensor_bytes(*(p.data for p in self.model.language_model.parameters()), *packed)

    def encode(self, features: Tensor) -> Tensor:
        """(S, M, r): the images' cores, to pass as `core`."""
        return self.model.encode_images(features)

    def next_token_logits(
        self,
        tokens: Tensor,
        features: Tensor | None = None,
        *,
        core: Tensor | None = None,
        cache: FixedCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """(S, vocabulary): of a text whose keys and values transformers keeps, or of the next token after a cache.

        Args:
            tokens: (S, T).
            features, core: the images, one or the other.
            cache, start: read up to `start`, written from there.
        """
        self.model.eval()
        if cache is not None:
            cache.start = start
        found: Tensor = self.model(
            input_ids=tokens,
            image_features=features,
            visual_core=core,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return found[:, -1]

    def loss(self, tokens: Tensor, features: Tensor, *, dropout: bool) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the text, and its logits."""
        self.model.train()  # checkpointing happens in training mode alone
        self.model.memory.train(dropout)
        found = self.model(input_ids=tokens, image_features=features, labels=tokens, use_cache=False)
        return found.loss, found.logits

    def gradients(self) -> dict[str, Tensor]:
        """By the adapter's names; then forgets them."""
        found = {}
        for name, own in _PARAMETERS.items():
            parameter = self.model.memory.get_parameter(own)
            assert parameter.grad is not None
            found[name] = parameter.grad.detach().clone()
            parameter.grad = None
        return found


def _language_model(stack: Stack) -> nn.Module:
    """transformers' LLaMA whose parameters are the stack's own tensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    preset = stack.preset
    config = LlamaConfig(
        hidden_size=preset.width,
        intermediate_size=preset.pairs,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        num_hidden_layers=len(stack.layers),
        vocab_size=preset.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": stack.embedding.weight,
        "model.norm.weight": stack.norm.weight,
        "lm_head.weight": stack.head.weight,
    }
    for i, layer in enumerate(stack.layers):
        state |= {f"model.layers.{i}.{name}": parameter for name, parameter in layer.named_parameters()}
        weights = stack.ffn_weights(i)
        names = {"gate_proj": weights.gate, "up_proj": weights.key, "down_proj": weights.value.T}
        state |= {f"model.layers.{i}.mlp.{name}.weight": weight for name, weight in names.items()}
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = stack.rotary
    model.train(False)
    return model
