"""A whole LLaMA of transformers with random weights, whose FFNs compute any variant, and MemVPModel on the same weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from ffn_case import cache_per_image, memory_per_image
from measure import Built, Candidate, Outputs
from options import Setting
from roofline import FFNShape, head, layer
from timing import tensor_bytes
from torch import Tensor, nn
from variants import Variant, truths, variants
from workload import Adapter, Factors, Preset, Weights, text_tokens

OURS = "MemVPModel"
#: The check compares this many layers with float64: enough for every product to take part, little enough for any GPU's memory.
CHECKED_LAYERS = 2

_PARAMETERS = {
    "fc1_weight": "projector.fc1.weight",
    "fc1_bias": "projector.fc1.bias",
    "fc2_weight": "projector.fc2.weight",
    "fc2_bias": "projector.fc2.bias",
    "key_position": "key_position",
    "value_position": "value_position",
}


class FixedCache:
    """Keys and values of every layer in buffers of exactly the length that a step attends to, for transformers' models.

    The best that the prompt form can have: no concatenation per step, no padding, and so no mask, which leaves SDPA its fastest
    kernels. A step writes at `start` and reads everything up to it; repeated, it does the same work again.
    """

    def __init__(self, setting: Setting, *, layers: int, sequences: int, start: int) -> None:
        shape = (sequences, setting.preset.kv_heads, start + 1, setting.preset.head_width)
        generator = torch.Generator(device=setting.device).manual_seed(start)
        make = functools.partial(torch.randn, shape, device=setting.device, generator=generator)
        self.keys = [make().to(setting.dtype) for _ in range(layers)]
        self.values = [make().to(setting.dtype) for _ in range(layers)]
        self.start = start

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores the new entries and returns all."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[:, :, self.start :].copy_(key)
        values[:, :, self.start :].copy_(value)
        return keys, values

    # What transformers' models ask a cache besides: how many tokens it has seen, and how long and from where a mask has to be.

    def get_seq_length(self, *_: Any) -> int:
        return self.start

    def get_query_offset(self, *_: Any) -> int:
        return self.start

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.keys[0].shape[2], 0

    def double(self) -> FixedCache:
        """The same content in float64."""
        other = copy.copy(self)
        other.keys, other.values = ([t.double() for t in tensors] for tensors in (self.keys, self.values))
        return other


class Llama:
    """The weights that all cases of a run share.

    Attributes:
        whole: a frozen LlamaForCausalLM.
        checked: its first CHECKED_LAYERS layers, the same tensors.
        exact: a float64 copy of `checked`.
    """

    def __init__(self, setting: Setting) -> None:
        from transformers import LlamaForCausalLM

        previous = torch.get_default_dtype()
        torch.set_default_dtype(setting.dtype)
        try:
            with setting.device:
                self.whole = LlamaForCausalLM(_config(setting.preset, setting.layers)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(previous)
        generator = torch.Generator(device=setting.device).manual_seed(0)
        for parameter in self.whole.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        self.checked = sharing(self.whole, min(CHECKED_LAYERS, setting.layers))

    @functools.cached_property
    def exact(self) -> nn.Module:
        return in_float64(self.checked)


def in_float64(model: nn.Module) -> nn.Module:
    for mlp in _mlps(model):  # a variant's memory may have a graph, which can't be copied
        vars(mlp).pop("forward", None)
    return copy.deepcopy(model).double()


def _config(preset: Preset, layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=preset.width,
        intermediate_size=preset.pairs,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        num_hidden_layers=layers,
        vocab_size=preset.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )


def sharing(model: Any, layers: int | None = None) -> Any:
    """Another LlamaForCausalLM on the same tensors, of the first layers where so asked."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        other = type(model)(config)
    wanted = other.state_dict()
    other.load_state_dict({name: t for name, t in model.state_dict().items() if name in wanted}, assign=True)
    other.model.rotary_emb = model.model.rotary_emb
    return other.eval().requires_grad_(False)


def _mlps(model: Any) -> Iterable[Any]:
    return (layer.mlp for layer in model.model.layers)


def in_models(found: Mapping[str, Variant]) -> list[Variant]:
    """Those that a whole model can have: weights concatenated with every image's memory, in every layer, exceed any machine."""
    return [variant for variant in found.values() if variant.form != "concatenated"]


def use(model: Any, variant: Variant, shared: Any, dropout: float = 0.0) -> None:
    """From now on the model's FFNs compute `variant` on what all layers share; without memory and uncompiled, their own forward."""
    for mlp in _mlps(model):
        vars(mlp).pop("forward", None)
        if variant.name not in ("text", "prompt"):
            weights = Weights(mlp.up_proj.weight, mlp.down_proj.weight.T, mlp.gate_proj.weight)
            mlp.forward = functools.partial(_ffn, variant.step, weights, shared, dropout)


def _ffn(step: Any, weights: Weights, shared: Any, dropout: float, x: Tensor) -> Tensor:
    return step(x, weights, shared, dropout)


def memvp_model(base: Any, adapter: Adapter, **options: Any) -> Any:
    """A MemVPModel on the base, with a copy of the adapter's values."""
    from memvp_kernels import MemVPConfig, MemVPModel

    config = MemVPConfig(
        vision_dim=adapter.preset.vision_width,
        projector_dim=adapter.preset.projector_width,
        num_slots=adapter.key_position.shape[0],
        feature_scale=1.0,  # the adapter's own scales, see there
        memory_scale=adapter.scale,
    )
    model = MemVPModel(base, config, **options)
    with torch.no_grad():
        for own, name in _PARAMETERS.items():
            model.memory.get_parameter(name).copy_(adapter.get_parameter(own))
    return model


def take_gradients(model: Any) -> dict[str, Tensor]:
    """A MemVPModel's gradients by the adapter's names; then forgets them."""
    found = {own: model.memory.get_parameter(name).grad.detach().clone() for own, name in _PARAMETERS.items()}
    model.memory.zero_grad(set_to_none=True)
    return found


def candidates(
    setting: Setting, llama: Llama, *, sequences: int, text_length: int, visual_tokens: int, decode: bool
) -> list[Candidate]:
    """The variants of one forward through the model: time to first token (projector, memory or visual tokens, prefill), or the next
    token, with T (and the visual tokens, where they stand in the prompt) in the cache.

    Args:
        setting: device, dtype, preset.
        llama: weights.
        sequences, text_length: S and T; every sequence has its own image.
        visual_tokens: tokens of an image.
        decode: the next token.
    """
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    slots = max(preset.slots, visual_tokens)
    adapter = Adapter(preset, slots=slots, device=device)
    features = adapter.batch(sequences, visual_tokens)
    length = 1 if decode else text_length
    tokens = text_tokens(sequences, length, preset.vocabulary).to(device)
    shape = FFNShape.of(
        preset, sequences=sequences, tokens=length, visual_tokens=visual_tokens, element=setting.element
    )

    def start(form: str) -> int:
        """Tokens in the cache."""
        return (text_length + (visual_tokens if form == "prompt" else 0)) if decode else 0

    @functools.cache
    def cache(form: str, layers: int) -> FixedCache | None:
        at = start(form)
        return FixedCache(setting, layers=layers, sequences=sequences, start=at) if decode else None

    def cache_of(variant: Variant, model: Any) -> FixedCache | None:
        return cache("prompt" if variant.form == "prompt" else "text", len(model.model.layers))

    def last_logits(model: Any, **inputs: Any) -> Tensor:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    def forward(variant: Variant, model: Any, factors: Callable[[], Factors], kv: Any, shared: Any = None) -> Tensor:
        """Logits; before the first token also everything between the vision encoder and the model."""
        embedded = model.model.embed_tokens(tokens)
        if variant.has_memory and shared is None:
            shared = variant.share(factors())
        if variant.form == "prompt" and not decode:
            visual = adapter.project(features).to(dtype).to(embedded.dtype)
            embedded = torch.cat([visual, embedded], dim=1)
        use(model, variant, shared)
        return last_logits(model, inputs_embeds=embedded, past_key_values=kv)

    def factors() -> Factors:
        return adapter.factors(features, dtype=dtype)

    def call(variant: Variant, model: Any) -> tuple[Callable[[], Tensor], int]:
        kv = cache_of(variant, model)
        held = tensor_bytes(*([] if kv is None else (kv.keys, kv.values)))
        if not decode or not variant.has_memory:
            return functools.partial(forward, variant, model, factors, kv), held
        shared = variant.share(factors())
        return functools.partial(forward, variant, model, factors, kv, shared), held + tensor_bytes(shared)

    def memvp(base: Any) -> tuple[Callable[[], Tensor], int]:
        from memvp_kernels.models.inputs import Images

        model = memvp_model(sharing(base), adapter).eval()
        if not decode:
            return functools.partial(last_logits, model, input_ids=tokens, image_features=features), 0
        # As generate() has it: the memory is read once, and every step gets it.
        kv, prompt = cache("text", len(base.model.layers)), text_tokens(sequences, text_length, preset.vocabulary)
        memory = model._read({"input_ids": prompt.to(device)}, Images(features)).memory
        inputs = {"input_ids": tokens, "visual_memory": memory, "past_key_values": kv}
        return functools.partial(last_logits, model.language_model, **inputs), tensor_bytes(
            kv.keys, kv.values, memory.core
        )

    def plain(variant: Variant) -> Outputs:
        return {"logits": call(variant, llama.checked)[0]()}

    def exact(variant: Variant) -> Outputs:
        kv, wide = cache_of(variant, llama.checked), factors().map(Tensor.double)
        return {"logits": forward(variant, llama.exact, lambda: wide, None if kv is None else kv.double())}

    truth = truths(device, plain, exact)
    weight_bytes = tensor_bytes(*llama.whole.parameters())
    depth = len(llama.whole.model.layers) / len(llama.checked.model.layers)

    def build(make: Callable[[Any], tuple[Callable[[], Tensor], int]]) -> Built:
        timed, held = make(llama.whole)
        return Built(lambda: {"logits": make(llama.checked)[0]()}, [timed], weight_bytes + held, depth=depth)

    def candidate(name: str, form: str, make: Any, missing: str | None = None) -> Candidate:
        memory = memory_per_image(form, setting, slots=slots)
        count = layer(form, preset, shape, cached=start(form)) * setting.layers
        return Candidate(
            name,
            functools.partial(build, make),
            functools.partial(truth, form),
            count + head(preset, rows=sequences, element=setting.element),
            missing=missing,
            memory_per_image=memory,
            cache_per_image=cache_per_image(form, setting, visual_tokens=visual_tokens),
            note=checked_note(setting),
        )

    found = [
        candidate(v.name, v.form, functools.partial(call, v), v.missing(device))
        for v in in_models(variants(device, compiled=setting.compiled))
        if setting.wants(v.name)
    ]
    return found + ([candidate(OURS, "factored", memvp)] if setting.wants(OURS) else [])


def checked_note(setting: Setting) -> str:
    """For the rows of a model of which only a part was compared with float64."""
    layers = setting.layers
    return f"checked on {CHECKED_LAYERS} of {layers} layers" if layers > CHECKED_LAYERS else ""
