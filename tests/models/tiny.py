"""Tiny language models of every family, a batch for them, and an independent forward with memory: hooks on a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel

VOCABULARY, WIDTH, VISION = 40, 32, 12
CONFIG = MemVPConfig(vision_dim=VISION, projector_dim=6, num_slots=10, feature_scale=0.5, memory_scale=0.7, dropout=0.0)


def decoder(config: Any, model: Any, **extra: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return model(config(**{**sizes, **extra}))


def _t5(config: Any, model: Any, **extra: Any) -> nn.Module:
    return model(
        config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_ff=48,
            d_kv=8,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=1,
            decoder_start_token_id=0,
            **extra,
        )
    )


def _bart(**extra: Any) -> nn.Module:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_ffn_dim=48,
            decoder_ffn_dim=40,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **extra,
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: decoder(tf.LlamaConfig, tf.LlamaForCausalLM),
    "llama-biased": lambda: decoder(tf.LlamaConfig, tf.LlamaForCausalLM, mlp_bias=True),
    "mistral": lambda: decoder(tf.MistralConfig, tf.MistralForCausalLM),
    "qwen2": lambda: decoder(tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": lambda: decoder(tf.Qwen3Config, tf.Qwen3ForCausalLM),
    "gemma": lambda: decoder(tf.GemmaConfig, tf.GemmaForCausalLM),
    "gemma2": lambda: decoder(tf.Gemma2Config, tf.Gemma2ForCausalLM),
    "gemma3": lambda: decoder(tf.Gemma3TextConfig, tf.Gemma3ForCausalLM),
    "t5": lambda: _t5(tf.T5Config, tf.T5ForConditionalGeneration, feed_forward_proj="relu"),
    "t5-gated": lambda: _t5(tf.T5Config, tf.T5ForConditionalGeneration, feed_forward_proj="gated-gelu"),
    "mt5": lambda: _t5(tf.MT5Config, tf.MT5ForConditionalGeneration),
    "mt5-plain": lambda: _t5(tf.MT5Config, tf.MT5ForConditionalGeneration, feed_forward_proj="relu"),
    "bart": _bart,
}
#: One family for each kind of layer and of FFN; what goes by the kind need not run on the families that share it.
KINDS = ("llama", "gemma3", "t5", "t5-gated", "bart")
ENCODER_DECODERS = ("t5", "t5-gated", "mt5", "mt5-plain", "bart")


def language_model(family: str = "llama", seed: int = 0) -> Any:
    """A tiny random model in eval mode; biases and norms are random too, so that leaving one out is seen."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def one_layer() -> Any:
    """The quickest model to trace."""
    torch.manual_seed(0)
    return decoder(tf.LlamaConfig, tf.LlamaForCausalLM, num_hidden_layers=1).eval()


def wrapped(family: str = "llama", config: MemVPConfig = CONFIG, seed: int = 0, **options: Any) -> MemVPModel:
    """A MemVPModel in eval mode whose memory matters: p^v and the projector's bias are not zero."""
    return with_memory(language_model(family, seed), config, **options)


def with_memory(base: nn.Module, config: MemVPConfig = CONFIG, **options: Any) -> MemVPModel:
    """``base`` with random, large memory."""
    model = MemVPModel(base, config, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.memory.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model.train(base.training)


def shuffled(base: Any, seed: int) -> Any:
    """The same function, its FFNs' pairs in another order: another draw of the rounding of their sums."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in base.modules():
            own = module._modules
            first = [own[name] for name in ("gate_proj", "up_proj", "wi", "wi_0", "wi_1", "fc1") if name in own]
            last = [own[name] for name in ("down_proj", "wo", "fc2") if name in own]
            if not (first and last):
                continue
            order = torch.randperm(first[0].out_features, generator=generator)
            for linear in first:
                for parameter in linear.parameters():
                    parameter.copy_(parameter[order])
            last[0].weight.copy_(last[0].weight[:, order])
    return base


def tokens(samples: int = 3, length: int = 5, seed: int = 2) -> Tensor:
    """Token ids that are no special ones."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def inputs(samples: int = 3) -> dict[str, Tensor]:
    """Ids that are their own labels."""
    return {"input_ids": tokens(samples), "labels": tokens(samples)}


def features(*counts: int, seed: int = 3) -> list[Tensor | None]:
    """One entry per sample: that many visual tokens, or None for 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, VISION, generator=generator) if n else None for n in counts]


#: Of three samples: a short image, none, one that fills every slot.
IMAGES = features(4, 0, 10)


def oracle(
    base: nn.Module,
    model: MemVPModel,
    images: Sequence[Tensor | None],
    *,
    dtype: torch.dtype = torch.float64,
    factored: bool = False,
    **inputs: Any,
) -> tuple[Any, list[Tensor]]:
    """The paper's equations on a plain copy of ``base``, added to each FFN by hooks.

    K and V are materialised per image, in float64, unless asked otherwise; ``factored`` in a half precision is what plain
    PyTorch makes of the products in the factored order, the tolerance for that precision.

    Returns:
        The copy's output, and the gradients that ``output.loss`` (if any) gives p^k, p^v and the projector's parameters.
    """
    config = model.memvp_config
    lm = copy.deepcopy(base).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    parts = [model.key_position, model.value_position, *model.projector.parameters()]
    key_position, value_position, w1, b1, w2, b2 = leaves = [p.detach().to(wide).requires_grad_() for p in parts]
    core = torch.zeros(len(images), config.num_slots, len(b1) + 1, dtype=wide)
    for i, image in enumerate(images):
        if image is not None:
            rows = F.silu(image.to(wide) @ w1.T + b1)
            core[i, : len(rows)] = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    basis = config.feature_scale * torch.cat([w2.T, b2[None]])

    ffns = _ffns(lm)
    for n, layer in enumerate(range(len(ffns)) if config.layers is None else config.layers):
        first, last, act = ffns[layer]
        pk, pv = (p[n] if p.dim() == 3 else p for p in (key_position, value_position))
        if factored:
            branch = _factored(core.to(dtype), basis.to(dtype), pk.to(dtype), pv.to(dtype), act)
        else:
            branch = _materialised((core @ basis + pk).to(dtype), (core @ basis + pv).to(dtype), act)
        _add_branch(first, last, branch, config.memory_scale)
    out = lm(**inputs)
    gradients = [] if out.get("loss") is None else list(torch.autograd.grad(out.loss, leaves))
    return out, gradients


Branch = Callable[[Tensor], Tensor]


def _materialised(k: Tensor, v: Tensor, act: Branch) -> Branch:
    return lambda x: act(x @ k.transpose(1, 2)) @ v


def _factored(a: Tensor, w: Tensor, pk: Tensor, pv: Tensor, act: Branch) -> Branch:
    def branch(x: Tensor) -> Tensor:
        visual = act((x @ w.T) @ a.transpose(1, 2) + x @ pk.T)
        return (visual @ a) @ w + visual @ pv

    return branch


def _add_branch(first: nn.Module, last: nn.Module, branch: Branch, scale: float) -> None:
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last.register_forward_hook(lambda module, args, y: y + scale * branch(seen.pop()))


def _ffns(lm: nn.Module) -> list[tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]]:
    """(module that x enters, module that y leaves, activation) of every layer, encoder first."""
    gelu_tanh = lambda z: F.gelu(z, approximate="tanh")  # noqa: E731
    found: list[tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]] = []
    for module in lm.modules():
        name = type(module).__name__
        if name.endswith("MLP"):
            found.append((module, module, gelu_tanh if "Gemma" in name else F.silu))
        elif name.endswith("DenseActDense"):
            found.append((module, module, F.relu))
        elif name.endswith("DenseGatedActDense"):
            found.append((module, module, gelu_tanh))
        elif name in ("BartEncoderLayer", "BartDecoderLayer"):
            found.append((module.fc1, module.fc2, F.gelu))
    return found
