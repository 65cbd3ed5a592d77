"""Bytes that an image occupies while its conversation lasts, by the way it is kept."""

from __future__ import annotations

from harness.presets import Preset

__all__ = ["cache_per_image", "memory_per_image"]


def memory_per_image(form: str, preset: Preset, *, slots: int, layers: int, element: int) -> int:
    """Of MemVP's memory: one for all layers, except where it is concatenated with each layer's weights.

    Args:
        form: of harness.rooflines.FORMS.
        preset: widths.
        slots: M.
        layers: decoder layers.
        element: bytes of one number.
    """
    numbers = {
        "text": 0,
        "prompt": 0,
        "official": slots * preset.width,  # f; K and V come and go
        "positions": slots * preset.width,
        "formed": 2 * slots * preset.width,
        "factored": slots * preset.rank,
        "concatenated": 2 * (preset.pairs + slots) * preset.width * layers,
    }
    return numbers[form] * element


def cache_per_image(form: str, preset: Preset, *, visual_tokens: int, layers: int, element: int) -> int:
    """Of the KV cache: keys and values of the visual tokens, in every layer, when they stand in the prompt."""
    return 2 * visual_tokens * preset.kv_width * layers * element if form == "prompt" else 0
