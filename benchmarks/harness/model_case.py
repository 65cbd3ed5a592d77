"""A whole model: time to first token (projector, memory or visual tokens, prefill) and time per generated token (from a full cache)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from harness.cli import Setting
from harness.ffn_case import too_big
from harness.footprint import cache_per_image, memory_per_image
from harness.inputs import text_tokens
from harness.measure import Candidate, Truth, held_bytes
from harness.operands import Adapter, Parts
from harness.product import NAME, Product
from harness.rooflines import FFNShape, head, layer
from harness.stack import FixedCache, Stack
from harness.timer import Run
from harness.variants import PLAIN_PYTORCH, Variant, variants, yardstick

__all__ = ["Model", "candidates"]

#: The check compares this many layers with float64: enough for every product to take part, little enough for any GPU's memory.
CHECKED_LAYERS = 2

#: How the outputs are computed, the run, bytes held: of Candidate.build.
Built = tuple[Callable[[], dict[str, Tensor]], Run, int]


@dataclass
class Model:
    """Weights that all cases of a run share, made once.

    Attributes:
        stack: all layers.
        head: the first CHECKED_LAYERS of them, the same tensors.
        exact: `head` in float64.
    """

    stack: Stack
    head: Stack = field(init=False)

    def __post_init__(self) -> None:
        self.head = self.stack.first(min(CHECKED_LAYERS, len(self.stack.layers)))

    @functools.cached_property
    def exact(self) -> Stack:
        return self.head.double()

    @classmethod
    def of(cls, setting: Setting) -> Model:
        """The model of a setting."""
        return cls(Stack(setting.preset, layers=setting.layers, device=setting.device, dtype=setting.dtype))


def candidates(
    setting: Setting, model: Model, *, sequences: int, text_length: int, visual_tokens: int, decode: bool
) -> list[Candidate]:
    """The variants of one forward through the model: of the whole prompt, or of the next token.

    Args:
        setting: device, dtype, preset.
        model: weights.
        sequences, text_length: S and T; every sequence has its own image.
        visual_tokens: tokens of an image.
        decode: the next token, T (and the visual tokens, where they stand in the prompt) being in the cache.
    """
    device, dtype, preset = setting.device, setting.dtype, setting.preset
    slots = max(preset.slots, visual_tokens)
    adapter = Adapter(preset, slots=slots, device=device)
    features = adapter.batch(sequences, visual_tokens)
    tokens = text_tokens(sequences, 1 if decode else text_length, preset.vocabulary, device=device)
    shape = FFNShape.of(
        preset, sequences=sequences, tokens=tokens.shape[1], visual_tokens=visual_tokens, element=setting.element
    )

    def start(form: str) -> int:
        """Position of the first token that runs."""
        return text_length + (visual_tokens if form == "prompt" else 0) if decode else 0

    @functools.cache
    def cache(prompt: bool, checked: bool) -> FixedCache:
        length = text_length + (visual_tokens if prompt else 0) + int(decode)
        layers = len((model.head if checked else model.stack).layers)
        return FixedCache(preset, layers=layers, sequences=sequences, length=length, device=device, dtype=dtype)

    def forward(
        variant: Variant,
        stack: Stack,
        bound: list[Any] | None,
        *,
        kv: FixedCache,
        project: Callable[[], tuple[Parts, Tensor]],
    ) -> Tensor:
        """Logits; on the way to the first token also everything that comes between the vision encoder and the model."""
        visual = None
        if not decode and variant.form != "text":
            parts, in_front = project()
            bound = stack.bind(variant, parts)
            visual = in_front if variant.form == "prompt" else None
        stack.use(variant, bound=bound)
        return stack.next_token_logits(stack.embed(tokens, visual), cache=kv, start=start(variant.form))

    def project(variant: Variant) -> tuple[Parts, Tensor]:
        if variant.form == "prompt":
            return None, adapter.project(features).to(dtype)  # type: ignore[return-value]
        return adapter.parts(features, dtype=dtype), None  # type: ignore[return-value]

    def run(variant: Variant, stack: Stack, *, checked: bool) -> tuple[Callable[[], Tensor], int]:
        kv = cache(variant.form == "prompt", checked)
        bound = stack.bind(variant, adapter.parts(features, dtype=dtype)) if decode else None
        call = functools.partial(forward, variant, stack, bound, kv=kv, project=functools.partial(project, variant))
        return call, kv.bytes + held_bytes(bound if decode else [])

    @functools.cache
    def plain(name: str) -> dict[str, Tensor]:
        return {"logits": run(variants(device, compiled=False)[name], model.head, checked=True)[0]()}

    @functools.cache
    def exact(name: str) -> dict[str, Tensor]:
        variant = variants(device, compiled=False)[name]
        bound, wide = None, None
        if decode:
            bound = model.exact.bind(variant, adapter.parts(features, dtype=dtype).map(Tensor.double))
        else:
            wide = _wide(project(variant))
        kv = cache(variant.form == "prompt", True).double()
        return {"logits": forward(variant, model.exact, bound, kv=kv, project=lambda: wide)}  # type: ignore[arg-type, return-value]

    def truth(form: str) -> Truth:
        return Truth(plain(yardstick(form)), exact(form if form in ("text", "prompt") else PLAIN_PYTORCH))

    def build(variant: Variant) -> Built:
        def outputs() -> dict[str, Tensor]:
            return {"logits": run(variant, model.head, checked=True)[0]()}

        call, held = run(variant, model.stack, checked=False)
        return outputs, Run([call], replay_depth=_depth(model)), model.stack.bytes + held

    found = []
    for variant in variants(device, compiled=setting.compiled).values():
        if not setting.wants(variant.name) or (variant.rows is not None and tokens.numel() > variant.rows):
            continue
        size = {"preset": preset, "layers": setting.layers, "element": setting.element}
        memory = memory_per_image(variant.form, slots=slots, **size)  # type: ignore[arg-type]
        count = layer(variant.form, preset, shape, cached=start(variant.form)) * setting.layers
        found.append(
            Candidate(
                name=variant.name,
                build=functools.partial(build, variant),
                truth=functools.partial(truth, variant.form),
                count=count + head(preset, rows=sequences, element=setting.element),
                missing=variant.missing(device) or too_big(sequences * memory, device),
                memory_per_image=memory,
                cache_per_image=cache_per_image(variant.form, visual_tokens=visual_tokens, **size),  # type: ignore[arg-type]
                note=f"checked on {CHECKED_LAYERS} of {setting.layers} layers"
                if setting.layers > CHECKED_LAYERS
                else "",
            )
        )
    if setting.wants(NAME):
        kv = functools.partial(cache, False) if decode else None
        found.append(_product_candidate(setting, model, adapter, features, tokens, shape, truth, kv, start("factored")))
    return found


def _product_candidate(
    setting: Setting,
    model: Model,
    adapter: Adapter,
    features: Tensor,
    tokens: Tensor,
    shape: FFNShape,
    truth: Callable[[str], Truth],
    cache: Callable[[bool], FixedCache] | None,
    start: int,
) -> Candidate:
    """MemVPModel on the way to the first token or, with a cache of (checked part of the model) → keys and values, to the next."""
    preset, layers, element = setting.preset, setting.layers, setting.element

    def call(stack: Stack, checked: bool) -> tuple[Callable[[], Tensor], int]:
        product = Product(stack, adapter)
        if cache is None:
            return functools.partial(product.next_token_logits, tokens, features), 0
        kv, core = cache(checked), product.encode(features)
        return functools.partial(product.next_token_logits, tokens, core=core, cache=kv, start=start), (
            kv.bytes + held_bytes(core)
        )

    def build() -> Built:
        def outputs() -> dict[str, Tensor]:
            return {"logits": call(model.head, True)[0]()}

        timed, held = call(model.stack, False)
        return outputs, Run([timed], replay_depth=_depth(model)), model.stack.bytes + held

    return Candidate(
        name=NAME,
        build=build,
        truth=functools.partial(truth, "factored"),
        count=layer("factored", preset, shape, cached=start) * layers
        + head(preset, rows=shape.sequences, element=element),
        memory_per_image=memory_per_image("factored", preset, slots=shape.slots, layers=layers, element=element),
        note="with all of transformers' forward around it",
    )


def _depth(model: Model) -> float:
    return len(model.stack.layers) / len(model.head.layers)


def _wide(projected: tuple[Parts | None, Tensor | None]) -> tuple[Parts | None, Tensor | None]:
    parts, visual = projected
    return (None if parts is None else parts.map(Tensor.double)), (None if visual is None else visual.double())
