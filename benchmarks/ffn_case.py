"""One FFN, forward: every variant on the same weights and images, operands rotated past the cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from measure import Built, Candidate, Outputs
from options import Setting
from roofline import FFNShape, ffn_forward
from timing import operand_sets, tensor_bytes
from torch import Tensor
from variants import Variant, exact_ffn, truths, variants
from workload import Adapter, Weights, hidden_states


def candidates(
    setting: Setting,
    *,
    sequences: int,
    text_length: int,
    visual_tokens: int,
    decode: bool,
    chosen: Mapping[str, Variant] | None = None,
) -> list[Candidate]:
    """The variants of one FFN call over (S, T, d).

    Args:
        setting: device, dtype, preset.
        sequences, text_length: S and T; every sequence has its own image.
        visual_tokens: tokens of an image.
        decode: the prompt form's visual tokens are in the cache, and its FFN does what text alone needs.
        chosen: the variants; default: all.
    """
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    in_prompt = 0 if decode else visual_tokens
    shape = FFNShape.of(
        preset, sequences=sequences, tokens=text_length, visual_tokens=in_prompt, element=setting.element
    )
    slots = max(preset.slots, visual_tokens)
    adapter = Adapter(preset, slots=slots, device=device)
    features = adapter.batch(sequences, visual_tokens)
    factors = adapter.factors(features, dtype=dtype).map(Tensor.detach)
    x = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype)
    in_front = adapter.project(features).detach()
    in_front = (in_front / in_front.pow(2).mean(-1, keepdim=True).sqrt()).to(dtype)
    with_prompt = x if decode else torch.cat([in_front, x], dim=1)

    @functools.cache
    def weights(index: int) -> Weights:
        return Weights.random(preset, device=device, dtype=dtype, seed=index)

    def rows(form: str) -> Tensor:
        return with_prompt if form == "prompt" else x

    def bound(variant: Variant, index: int) -> object:
        """Other operand sets get copies, so that nothing of them waits in the cache."""
        own = factors if index == 0 else factors.map(Tensor.clone)
        return variant.bind(weights(index), variant.share(own)) if variant.has_memory else None

    def plain(variant: Variant) -> Outputs:
        return {"y": variant.step(rows(variant.form), weights(0), bound(variant, 0), 0.0)}

    def exact(variant: Variant) -> Outputs:
        return {"y": exact_ffn(rows(variant.form), weights(0), factors if variant.has_memory else None)}

    truth = truths(device, plain, exact)

    def build(variant: Variant) -> Built:
        inputs, first = rows(variant.form), bound(variant, 0)
        kept = tensor_bytes(weights(0), first)
        calls = [functools.partial(variant.step, inputs, weights(0), first, 0.0)]
        for index in range(1, operand_sets(kept, device)):
            calls.append(functools.partial(variant.step, inputs, weights(index), bound(variant, index), 0.0))
        return Built(lambda: {"y": calls[0]()}, calls, kept + tensor_bytes(inputs))

    found = []
    for variant in (chosen or variants(device, compiled=setting.compiled)).values():
        if not setting.wants(variant.name):
            continue
        memory = memory_per_image(variant.form, setting, slots=slots)
        in_cache = "its visual tokens cost attention here, not the FFN" if decode and variant.form == "prompt" else ""
        found.append(
            Candidate(
                variant.name,
                functools.partial(build, variant),
                functools.partial(truth, variant.form),
                ffn_forward(variant.form, shape),
                missing=variant.missing(device) or too_big(sequences * memory, device),
                memory_per_image=memory,
                note=in_cache,
            )
        )
    return found


def memory_per_image(form: str, setting: Setting, *, slots: int) -> int:
    """Bytes of MemVP's memory of one image, one for all layers, except where it is concatenated with a layer's weights."""
    d = setting.preset.width
    numbers = {
        "official": slots * d,
        "positions": slots * d,
        "plain": 2 * slots * d,
        "factored": slots * setting.preset.rank,
    }
    numbers["concatenated"] = 2 * (setting.preset.pairs + slots) * d
    return numbers.get(form, 0) * setting.element


def cache_per_image(form: str, setting: Setting, *, visual_tokens: int) -> int:
    """Bytes of the KV cache: keys and values of the visual tokens, in every layer, when they stand in the prompt."""
    return 2 * visual_tokens * setting.preset.kv_width * setting.layers * setting.element if form == "prompt" else 0


def too_big(size: int, device: torch.device) -> str | None:
    """Why an operand of this many bytes is not even tried; None where a third of the free memory holds it."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 12 * 2**30
    return f"needs {size / 1e9:.1f} GB for its operands" if size > free // 3 else None
