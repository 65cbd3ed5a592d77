"""The shapes of the models whose speed is measured; weights are random, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A LLaMA and the memory that MemVP gives it.

    Attributes:
        width: d.
        pairs: F, key-value pairs of each FFN.
        heads, kv_heads: attention heads, and those that keys and values have (fewer under GQA).
        layers: decoder layers.
        vocabulary: tokens.
        slots: M, at least; an image with more tokens raises it.
        vision_width, projector_width: of the projector, Linear, SiLU, Linear.
    """

    width: int
    pairs: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    slots: int
    vision_width: int = 1024
    projector_width: int = 128

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def rank(self) -> int:
        """r of the factored memory: the projector's inner width and a column of ones, to the next multiple of 8."""
        return (self.projector_width + 1 + 7) // 8 * 8


PRESETS = {
    # Says nothing about speed; for --quick and the tests.
    "smallest": Preset(
        width=64,
        pairs=168,
        heads=4,
        kv_heads=2,
        layers=2,
        vocabulary=256,
        slots=24,
        vision_width=64,
        projector_width=20,
    ),
    # A LLaMA small enough for two CPU cores, in the proportions of the 7B one (F / d = 2.7).
    "tiny": Preset(width=512, pairs=1408, heads=8, kv_heads=8, layers=4, vocabulary=4096, slots=320),
    "llama-7b": Preset(width=4096, pairs=11008, heads=32, kv_heads=32, layers=32, vocabulary=32000, slots=320),
    "llama-13b": Preset(width=5120, pairs=13824, heads=40, kv_heads=40, layers=40, vocabulary=32000, slots=400),
    "llama3-8b": Preset(width=4096, pairs=14336, heads=32, kv_heads=8, layers=32, vocabulary=128256, slots=320),
    "llama-70b": Preset(width=8192, pairs=28672, heads=64, kv_heads=8, layers=80, vocabulary=32000, slots=400),
}
