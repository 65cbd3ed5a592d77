"""One FFN, forward: every variant on the same weights and images, operands rotated past the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.cli import Setting
from harness.footprint import memory_per_image
from harness.inputs import hidden_states
from harness.measure import Candidate, Truth, held_bytes
from harness.operands import Adapter, Parts, Weights
from harness.rooflines import FFNShape, ffn_forward
from harness.timer import Run, operand_sets
from harness.variants import Variant, variants, yardstick
from memvp_kernels import reference

__all__ = ["candidates", "exact_ffn", "too_big"]


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
        decode: T is 1, and the prompt form's visual tokens are in the cache: its FFN does what text alone needs.
        chosen: the variants; default: all of harness.variants.
    """
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    tokens = 1 if decode else text_length
    shape = FFNShape.of(
        preset,
        sequences=sequences,
        tokens=tokens,
        visual_tokens=0 if decode else visual_tokens,
        element=setting.element,
    )
    slots = max(preset.slots, visual_tokens)
    adapter = Adapter(preset, slots=slots, device=device)
    features = adapter.batch(sequences, visual_tokens)
    parts = adapter.parts(features, dtype=dtype).map(Tensor.detach)
    x = hidden_states(sequences, tokens, preset.width, device=device, dtype=dtype)
    in_front = adapter.project(features).detach()
    in_front = (in_front / in_front.pow(2).mean(-1, keepdim=True).sqrt()).to(dtype)
    x_prompt = x if decode else torch.cat([in_front, x], dim=1)

    @functools.cache
    def weights(index: int) -> Weights:
        return Weights.random(preset, device=device, dtype=dtype, seed=index)

    def rows(form: str) -> Tensor:
        return x_prompt if form == "prompt" else x

    @functools.cache
    def plain(name: str) -> dict[str, Tensor]:
        variant = variants(device, compiled=False)[name]
        bound = variant.bind(weights(0), variant.share(parts)) if variant.has_memory else None
        return {"y": variant.step(rows(variant.form), weights(0), bound, 0.0)}

    @functools.cache
    def exact(form: str) -> dict[str, Tensor]:
        return {"y": exact_ffn(rows(form), weights(0), None if form in ("text", "prompt") else parts)}

    def truth(form: str) -> Truth:
        return Truth(plain(yardstick(form)), exact(form if form in ("text", "prompt") else "memory"))

    def build(variant: Variant) -> tuple[Callable[[], dict[str, Tensor]], Run, int]:
        first = variant.bind(weights(0), variant.share(parts)) if variant.has_memory else None
        kept = held_bytes(weights(0), first)
        calls: list[Callable[[], object]] = []
        for index in range(operand_sets(kept, device)):
            w = weights(index)
            bound = first if index == 0 or not variant.has_memory else _fresh(variant, w, parts)
            calls.append(functools.partial(variant.step, rows(variant.form), w, bound, 0.0))

        def outputs() -> dict[str, Tensor]:
            return {"y": variant.step(rows(variant.form), weights(0), first, 0.0)}

        return outputs, Run(calls), kept + held_bytes(rows(variant.form))

    found = []
    for variant in (chosen or variants(device, compiled=setting.compiled)).values():
        if not setting.wants(variant.name) or (variant.rows is not None and shape.rows(variant.form) > variant.rows):
            continue
        footprint = memory_per_image(variant.form, preset, slots=slots, layers=1, element=setting.element)
        found.append(
            Candidate(
                name=variant.name,
                build=functools.partial(build, variant),
                truth=functools.partial(truth, variant.form),
                count=ffn_forward(variant.form, shape),
                missing=variant.missing(device) or too_big(sequences * footprint, device),
                memory_per_image=footprint,
                note="its visual tokens cost attention here, not the FFN"
                if decode and variant.form == "prompt"
                else "",
            )
        )
    return found


def exact_ffn(x: Tensor, weights: Weights, parts: Parts | None) -> Tensor:
    """The float64 definition of this package."""
    memory: dict[str, Any] = {}
    if parts is not None:
        memory = {
            "visual_key": parts.core,
            "visual_value": parts.core,
            "visual_basis": parts.basis,
            "key_position": parts.key_position,
            "value_position": parts.value_position,
            "visual_scale": parts.scale,
        }
    return reference.ffn(x, weights.key, weights.value, gate=weights.gate, **memory)


def too_big(size: int, device: torch.device) -> str | None:
    """Why an operand of this many bytes is not even tried; None where a third of the free memory holds it."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 12 * 2**30
    return f"needs {size / 1e9:.1f} GB for its operands" if size > free // 3 else None


def _fresh(variant: Variant, weights: Weights, parts: Parts) -> Any:
    """The bound memory of another operand set: new copies, so that nothing of it waits in the cache."""
    return variant.bind(weights, variant.share(parts.map(Tensor.clone)))
