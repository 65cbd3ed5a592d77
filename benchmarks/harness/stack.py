"""A LLaMA of transformers' decoder layers with random weights, whose FFNs run as any variant: one set of weights for all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.operands import Parts, Weights
from harness.presets import Preset
from harness.variants import PLAIN_PYTORCH, Variant, plain_ffn, variants

__all__ = ["FixedCache", "Stack"]


class FixedCache:
    """Keys and values of every layer in buffers of exactly the length that a step attends to.

    The best a prompt-length baseline can have: no concatenation per step, no padding, and so no mask, which leaves SDPA its fastest
    kernels. A step writes at `start` and reads everything up to it; repeated at the same `start`, it does the same work again.

    Args:
        preset: layers' heads and widths.
        layers: how many.
        sequences: S.
        length: tokens that the buffers hold.
        device, dtype: of the buffers.
    """

    def __init__(
        self, preset: Preset, *, layers: int, sequences: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (sequences, preset.kv_heads, length, preset.head_width)
        self.keys = [torch.randn(shape, device=device).to(dtype) for _ in range(layers)]
        self.values = [torch.randn(shape, device=device).to(dtype) for _ in range(layers)]
        self.start = 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: stores the new entries and returns all up to them."""
        end = self.start + key.shape[2]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.start : end].copy_(key)
        values[:, :, self.start : end].copy_(value)
        return keys[:, :, :end], values[:, :, :end]

    # What transformers' models ask a cache besides: how many tokens it has seen, and how long and from where a mask has to be.

    def get_seq_length(self, *_: Any) -> int:
        return self.start

    def get_query_offset(self, *_: Any) -> int:
        return self.start

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.keys[0].shape[2], 0

    def double(self) -> FixedCache:
        """The same content in float64."""
        twin = copy.copy(self)
        twin.keys = [t.double() for t in self.keys]
        twin.values = [t.double() for t in self.values]
        return twin

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class _SwitchedFFN(nn.Module):
    """Stands where a decoder layer had its LlamaMLP; runs the variant that the stack was told to use."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights
        self.variant: Variant | None = None
        self.bound: Any = None
        self.shared: Any = None
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.variant is None:
            return plain_ffn(x, self.weights)
        bound = self.variant.bind(self.weights, self.shared) if self.bound is None else self.bound
        return self.variant.step(x, self.weights, bound, self.dropout)


class Stack(nn.Module):
    """Embedding, decoder layers (SDPA attention), norm and output head; everything frozen.

    Args:
        preset: shape.
        layers: decoder layers; fewer than the preset's for a part of the model.
        device, dtype: of the weights.
        seed: of the weights.
    """

    def __init__(self, preset: Preset, *, layers: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=preset.width,
            intermediate_size=8,  # the layers' own MLPs are replaced
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            num_hidden_layers=layers,
            vocab_size=preset.vocabulary,
            max_position_embeddings=4096,
        )
        config._attn_implementation = "sdpa"
        self.preset = preset
        self.checkpointing = False
        generator = torch.Generator(device=device).manual_seed(seed)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.embedding = nn.Embedding(preset.vocabulary, preset.width)
                self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(layers))
                self.norm = LlamaRMSNorm(preset.width)
                self.head = nn.Linear(preset.width, preset.vocabulary, bias=False)
        finally:
            torch.set_default_dtype(previous)
        self.rotary = LlamaRotaryEmbedding(config).to(device)
        self.requires_grad_(False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        self._ffns: list[_SwitchedFFN] = []
        for i, layer in enumerate(self.layers):
            layer.mlp = _SwitchedFFN(Weights.random(preset, device=device, dtype=dtype, seed=seed + 1 + i))
            self._ffns.append(layer.mlp)
        self.eval()

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        own = sum(p.numel() * p.element_size() for p in self.parameters())
        return own + sum(t.numel() * t.element_size() for ffn in self._ffns for t in ffn.weights.tensors)

    def ffn_weights(self, layer: int) -> Weights:
        """The FFN's matrices of a layer."""
        return self._ffns[layer].weights

    def bind(self, variant: Variant, parts: Parts | None) -> list[Any]:
        """What each layer keeps of an image between steps of inference; pass it to :meth:`use`."""
        if not variant.has_memory:
            return [None for _ in self._ffns]
        assert parts is not None
        shared = variant.share(parts)
        return [variant.bind(ffn.weights, shared) for ffn in self._ffns]

    def use(
        self, variant: Variant, *, bound: Sequence[Any] | None = None, shared: Any = None, dropout: float = 0.0
    ) -> None:
        """From now on every FFN runs as `variant`, on what `bound` holds per layer, or else on what it binds in every call."""
        for i, ffn in enumerate(self._ffns):
            ffn.variant, ffn.shared, ffn.dropout = variant, shared, dropout
            ffn.bound = None if bound is None else bound[i]

    def embed(self, tokens: Tensor, visual: Tensor | None = None) -> Tensor:
        """(S, T, d) of the text, or (S, n + T, d) with visual tokens (S, n, d) in front."""
        text = self.embedding(tokens)
        return text if visual is None else torch.cat([visual.to(text.dtype), text], dim=1)

    def hidden(self, x: Tensor, *, cache: FixedCache | None = None, start: int = 0) -> Tensor:
        """The normalised output of the last layer, (S, T, d).

        Args:
            x: embedded tokens.
            cache: read up to `start`, written from there.
            start: position of the first token.
        """
        positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
        rotation = self.rotary(x, positions)
        if cache is not None:
            cache.start = start
        for layer in self.layers:
            options = {"position_ids": positions, "position_embeddings": rotation, "past_key_values": cache}
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, **options)
            else:
                x = layer(x, **options)
        normalised: Tensor = self.norm(x)
        return normalised

    def next_token_logits(self, x: Tensor, *, cache: FixedCache | None = None, start: int = 0) -> Tensor:
        """(S, vocabulary) of the last position."""
        logits: Tensor = self.head(self.hidden(x, cache=cache, start=start)[:, -1])
        return logits

    def loss(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the text, and its logits; x may have visual tokens in front, which are not predicted."""
        logits: Tensor = self.head(self.hidden(x)[:, -tokens.shape[1] :])
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, tokens[:, 1:].flatten()), logits

    def first(self, layers: int) -> Stack:
        """The stack cut after its first layers; it shares every tensor, and which variant runs, with this one."""
        cut = copy.copy(self)
        cut._modules = dict(self._modules)
        cut.layers = nn.ModuleList(list(self.layers)[:layers])
        cut._ffns = self._ffns[:layers]
        return cut

    def twin(self) -> Stack:
        """A copy with weights of its own."""
        for ffn in self._ffns:  # of the last forward; with its graph it could not be copied
            ffn.bound = ffn.shared = None
        return copy.deepcopy(self)

    def double(self) -> Stack:
        """A float64 copy whose FFNs compute the two branches with K and V formed: the reference.

        Takes four times the memory of a half-precision stack; check a stack of few layers.
        """
        twin = self.twin()
        nn.Module.double(twin)
        yardstick = variants(torch.device("cpu"), compiled=False)[PLAIN_PYTORCH]
        for ffn in twin._ffns:  # deepcopy kept them the layers' own
            ffn.weights = Weights(*(t.double() for t in ffn.weights.tensors))
            ffn.variant = yardstick
        return twin
