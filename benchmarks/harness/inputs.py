"""Real inputs: photographs cut into patches, English text as tokens. Zeros would run faster than any model ever does."""

from __future__ import annotations

import collections
import functools
import math
import re
import zlib

import torch
from torch import Tensor

__all__ = ["hidden_states", "image_features", "photographs", "source", "text_tokens"]

PATCH = 32  # pixels: a patch of one colour channel is a feature of width 32² = 1024, CLIP ViT-L/14's


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """scikit-learn's two bundled photographs as (height, width, 3) in [0, 1]; without scikit-learn or pillow, none."""
    try:
        from sklearn.datasets import load_sample_images

        return tuple(torch.tensor(image).float() / 255 for image in load_sample_images().images)
    except (ImportError, OSError):
        return ()


def source() -> str:
    """Where the images come from, for the result file."""
    return (
        "scikit-learn's photographs china.jpg and flower.jpg"
        if photographs()
        else "fractal noise (scikit-learn or pillow missing)"
    )


def image_features(images: int, tokens: int, width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(images, tokens, width): standardised patches, every image another crop, colour channel or reflection.

    Args:
        images: how many.
        tokens: patches of each.
        width: of a feature; a patch has 1024 numbers and is cut off or repeated to this.
        device, dtype: of the result.
    """
    if tokens == 0 or images == 0:
        return torch.zeros(images, tokens, width, device=device, dtype=dtype)
    side = math.ceil(math.sqrt(tokens))
    out = torch.empty(images, tokens, width)
    for i in range(images):
        picture = _picture(i)
        top = torch.linspace(0, picture.shape[0] - PATCH, side).long()
        left = torch.linspace(0, picture.shape[1] - PATCH, side).long()
        patches = torch.stack([picture[y : y + PATCH, x : x + PATCH].flatten() for y in top for x in left][:tokens])
        patches = patches.repeat(1, math.ceil(width / patches.shape[1]))[:, :width]
        out[i] = (patches - patches.mean()) / patches.std().clamp_min(1e-6)
    return out.to(device=device, dtype=dtype)


def text_tokens(sequences: int, length: int, vocabulary: int, *, device: torch.device, offset: int = 0) -> Tensor:
    """(sequences, length) int64: consecutive English words, numbered by how common they are (so with real text's Zipf curve).

    Args:
        sequences, length: S and T.
        vocabulary: numbers wrap around at it.
        device: of the result.
        offset: words to skip, for another batch.
    """
    ids = _word_numbers()
    wanted = sequences * length
    start = offset % len(ids)
    pick = (torch.arange(start, start + wanted) % len(ids)).long()
    return (ids[pick] % vocabulary).reshape(sequences, length).to(device)


def hidden_states(
    sequences: int, length: int, width: int, *, device: torch.device, dtype: torch.dtype, offset: int = 0
) -> Tensor:
    """(sequences, length, width): what an FFN sees, embedded text after a normalisation; unit root mean square."""
    vocabulary = 4096
    table = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(7))
    x = table[text_tokens(sequences, length, vocabulary, device=torch.device("cpu"), offset=offset)]
    # A little of its neighbours, as after attention, so that equal words are not equal rows.
    x = x + 0.5 * x.roll(1, dims=1) + 0.25 * x.roll(2, dims=1)
    return (x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)).to(device=device, dtype=dtype)


def _picture(i: int) -> Tensor:
    """(height, width), another one for every i: photograph, colour channel, reflection, crop."""
    pictures = photographs() or (_fractal(),)
    picture = pictures[i % len(pictures)]
    i //= len(pictures)
    channel = picture[..., i % picture.shape[-1]]
    i //= picture.shape[-1]
    if i % 2:
        channel = channel.flip(1)
    i //= 2
    if i % 2:
        channel = channel.flip(0)
    crop = 3 * (i // 2) % 128
    return channel[crop:, crop:]


@functools.cache
def _fractal() -> Tensor:
    """(427, 640, 3) noise with a photograph's 1/f spectrum, for machines without the photographs."""
    generator = torch.Generator().manual_seed(3)
    height, width = 427, 640
    frequency = (
        (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).sqrt().clamp_min(1 / width)
    )
    spectrum = torch.fft.rfft2(torch.randn(3, height, width, generator=generator)) / frequency
    picture = torch.fft.irfft2(spectrum, s=(height, width)).permute(1, 2, 0)
    low, high = picture.min(), picture.max()
    scaled: Tensor = (picture - low) / (high - low)
    return scaled


@functools.cache
def _word_numbers() -> Tensor:
    """The words of Python's own manual, which comes with every Python, each as its rank by frequency."""
    words = re.findall(r"[A-Za-z]+|[.,;:!?]", _english())
    rank = {word: i for i, (word, _) in enumerate(collections.Counter(words).most_common())}
    return torch.tensor([rank[word] for word in words])


def _english() -> str:
    try:
        from pydoc_data import topics
    except ImportError:  # a Python stripped of its manual: the docstrings that it runs on
        return "\n".join(
            f"{module.__doc__}" for module in (collections, functools, math, re, torch, zlib) for _ in range(8)
        )
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))
