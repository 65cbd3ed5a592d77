"""What is computed on: model shapes, real inputs, random weights and the memory of a batch of images.

Inputs are photographs cut into patches and English text, never zeros: a chip draws less power on zeros, and runs faster.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
_PATCH = 32  # pixels: a patch of one color channel is a feature of width 32² = 1024, CLIP ViT-L/14's


@dataclass(frozen=True)
class Preset:
    """The shape of a LLaMA and of the memory that MemVP gives it.

    Attributes:
        width, pairs: d and F.
        heads, kv_heads: attention heads, and those that keys and values have (fewer under GQA).
        layers, vocabulary: decoder layers, tokens.
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
    # For --quick and the tests; says nothing about speed.
    "smallest": Preset(64, 168, 4, 2, layers=2, vocabulary=256, slots=24, vision_width=64, projector_width=20),
    # Small enough for two CPU cores, in the proportions of the 7B one (F / d = 2.7).
    "tiny": Preset(512, 1408, 8, 8, layers=4, vocabulary=4096, slots=320),
    # Twice the work, in fewer and wider layers: the memory's share of an FFN is nearer to the 7B one's.
    "wide": Preset(1024, 2816, 16, 16, layers=2, vocabulary=4096, slots=320),
    "llama-7b": Preset(4096, 11008, 32, 32, layers=32, vocabulary=32000, slots=320),
    "llama-13b": Preset(5120, 13824, 40, 40, layers=40, vocabulary=32000, slots=400),
    "llama3-8b": Preset(4096, 14336, 32, 8, layers=32, vocabulary=128256, slots=320),
    "llama-70b": Preset(8192, 28672, 64, 8, layers=80, vocabulary=32000, slots=400),
}


@dataclass(frozen=True)
class Weights:
    """A gated FFN's matrices, each (F, d); `value` is a transposed view of (d, F), as a model stores it."""

    key: Tensor
    value: Tensor
    gate: Tensor

    @classmethod
    def random(cls, preset: Preset, *, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
        """Normal weights scaled so that every product keeps the scale of its input."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns, generator=generator, device=device) / math.sqrt(columns)).to(dtype)

        d, f = preset.width, preset.pairs
        return cls(key=matrix(f, d), value=matrix(d, f).T, gate=matrix(f, d))


@dataclass(frozen=True)
class Factors:
    """The factored memory of a batch: Kv = core·basis + key_position, Vv = core·basis + value_position.

    Attributes:
        core: (S, M, r).
        basis: (r, d), λ within.
        key_position, value_position: (M, d).
        scale: s.
    """

    core: Tensor
    basis: Tensor
    key_position: Tensor
    value_position: Tensor
    scale: float

    @property
    def features(self) -> Tensor:
        """f = core·basis, (S, M, d)."""
        return self.core @ self.basis

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """The same memory with every tensor changed."""
        return Factors(*map(change, (self.core, self.basis, self.key_position, self.value_position)), self.scale)


class Adapter(nn.Module):
    """What MemVP trains: projector (Linear, SiLU, Linear) and positions, float32 as in the paper.

    Memory and FFN contribute about equally to the output, so that a wrong memory can't hide behind a right FFN in the
    correctness check; the paper's λ = 0.01 and s = 0.1 take the same time.
    """

    def __init__(self, preset: Preset, *, slots: int, device: torch.device, seed: int = 0) -> None:
        super().__init__()
        self.preset = preset
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(*shape, generator=generator, device=device))

        v, p, d = preset.vision_width, preset.projector_width, preset.width
        self.fc1_weight = normal(p, v, std=1 / math.sqrt(v))
        self.fc1_bias = normal(p, std=0.1)
        self.fc2_weight = normal(d, p, std=1 / math.sqrt(p * d))
        self.fc2_bias = normal(d, std=0.1 / math.sqrt(d))
        self.key_position = normal(slots, d, std=1 / math.sqrt(d))
        self.value_position = normal(slots, d, std=1 / math.sqrt(slots))
        self.scale = 0.25

    def project(self, features: Tensor) -> Tensor:
        """f(Z), (S, n, d): what the prompt form puts in front of its text."""
        return F.linear(F.silu(F.linear(features, self.fc1_weight, self.fc1_bias)), self.fc2_weight, self.fc2_bias)

    def factors(self, features: Tensor, *, dtype: torch.dtype) -> Factors:
        """The factored memory of image features (S, n, vision width), in the model's dtype; rows past n are free slots."""
        inner = F.silu(F.linear(features, self.fc1_weight, self.fc1_bias))
        rows = torch.cat([inner, inner.new_ones(*inner.shape[:-1], 1)], dim=-1)
        slots, rank = self.key_position.shape[0], self.preset.rank
        core = F.pad(rows, (0, rank - rows.shape[-1], 0, slots - rows.shape[1]))
        basis = torch.cat([self.fc2_weight.T, self.fc2_bias.unsqueeze(0)])
        basis = F.pad(basis, (0, 0, 0, rank - basis.shape[0]))
        return Factors(core, basis, self.key_position, self.value_position, self.scale).map(lambda t: t.to(dtype))

    def batch(self, images: int, visual_tokens: int) -> Tensor:
        """Image features (images, visual_tokens, vision width) on the parameters' device."""
        return image_features(images, visual_tokens, self.preset.vision_width).to(self.fc1_weight.device)


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """scikit-learn's two bundled photographs as (height, width, 3) in [0, 1]; without scikit-learn or pillow, none."""
    package = importlib.util.find_spec("sklearn")  # not imported: that takes seconds
    folders = package.submodule_search_locations if package is not None else None
    try:
        from PIL import Image

        paths = [Path(folder) / "datasets" / "images" / name for folder in folders or () for name in _PHOTOGRAPHS]
        return tuple(torch.tensor(np.asarray(Image.open(path))).float() / 255 for path in paths)
    except (ImportError, OSError):
        return ()


def source() -> str:
    """Where the images come from, for the result file."""
    found = "scikit-learn's photographs china.jpg and flower.jpg"
    return found if photographs() else "fractal noise (scikit-learn or pillow missing)"


def image_features(images: int, tokens: int, width: int) -> Tensor:
    """(images, tokens, width) float32: standardized patches, every image another crop, color channel or reflection.

    A patch has 1024 numbers and is cut off or repeated to `width`.
    """
    out = torch.zeros(images, tokens, width)
    if tokens == 0:
        return out
    side = math.ceil(math.sqrt(tokens))
    for i in range(images):
        picture = _picture(i)
        top = torch.linspace(0, picture.shape[0] - _PATCH, side).long()
        left = torch.linspace(0, picture.shape[1] - _PATCH, side).long()
        patches = torch.stack([picture[y : y + _PATCH, x : x + _PATCH].flatten() for y in top for x in left][:tokens])
        patches = patches.repeat(1, math.ceil(width / patches.shape[1]))[:, :width]
        out[i] = (patches - patches.mean()) / patches.std().clamp_min(1e-6)
    return out


def text_tokens(sequences: int, length: int, vocabulary: int, *, offset: int = 0) -> Tensor:
    """(sequences, length) int64: consecutive English words, numbered by how common they are."""
    ids = _word_numbers()
    pick = torch.arange(offset, offset + sequences * length) % len(ids)
    return (ids[pick] % vocabulary).reshape(sequences, length)


def hidden_states(
    sequences: int, length: int, width: int, *, device: torch.device, dtype: torch.dtype, offset: int = 0
) -> Tensor:
    """(sequences, length, width): what an FFN sees, embedded text after a normalization; unit root mean square."""
    return _hidden_states(sequences, length, width, offset).to(device=device, dtype=dtype, copy=True)


@functools.lru_cache(maxsize=2)
def _hidden_states(sequences: int, length: int, width: int, offset: int) -> Tensor:
    vocabulary = 4096
    table = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(7))
    x = table[text_tokens(sequences, length, vocabulary, offset=offset)]
    # A little of its neighbors, as after attention, so that equal words are not equal rows.
    x = x + 0.5 * x.roll(1, dims=1) + 0.25 * x.roll(2, dims=1)
    return x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


def _picture(i: int) -> Tensor:
    """(height, width), another one for every i: photograph, color channel, reflection, crop."""
    pictures = photographs() or (_fractal(),)
    i, which = divmod(i, len(pictures))
    i, channel = divmod(i, 3)
    crop, flips = divmod(i, 4)
    picture = pictures[which][..., channel]
    picture = picture.flip([axis for axis in (0, 1) if flips >> (1 - axis) & 1])
    crop = 3 * crop % 128
    return picture[crop:, crop:]


@functools.cache
def _fractal() -> Tensor:
    """(427, 640, 3) noise with a photograph's 1/f spectrum, for machines without the photographs."""
    generator = torch.Generator().manual_seed(3)
    height, width = 427, 640
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).sqrt()
    spectrum = torch.fft.rfft2(torch.randn(3, height, width, generator=generator)) / frequency.clamp_min(1 / width)
    picture = torch.fft.irfft2(spectrum, s=(height, width)).permute(1, 2, 0)
    return (picture - picture.min()) / (picture.max() - picture.min())


@functools.cache
def _word_numbers() -> Tensor:
    """The words of Python's own manual, which comes with every Python, each as its rank by frequency."""
    try:
        from pydoc_data import topics

        english = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    except ImportError:  # a Python stripped of its manual: the docstrings that it runs on
        english = "\n".join(f"{module.__doc__}" for module in (collections, functools, math, re, torch, zlib)) * 8
    words = re.findall(r"[A-Za-z]+|[.,;:!?]", english)
    rank = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common())}
    return torch.tensor([rank[word] for word in words])
