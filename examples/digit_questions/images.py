"""scikit-learn's 1,797 handwritten digits (8 × 8 pixels), split by image and cut into patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["GRID", "PATCH", "Images", "load"]

PATCH = 4
"""Width of a patch; patches overlap, one starts at every pixel."""
GRID = 8 - PATCH + 1
"""Patches along each side of an image."""


class Images(NamedTuple):
    """One side of the split.

    Attributes:
        pixels: (n, 8, 8), 0 to 1.
        features: (n, GRID², PATCH²), the patches row by row, standardised.
        digits: what each image shows.
    """

    pixels: Tensor
    features: Tensor
    digits: list[int]

    def __len__(self) -> int:
        return len(self.digits)


def load(*, held_out: int = 360, seed: int = 0) -> tuple[Images, Images]:
    """The images to learn from and those to be asked about, which no training step sees.

    Args:
        held_out: how many of the 1,797 are held out.
        seed: of the shuffle before the split.
    """
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32) / 16
    features = pixels.unfold(1, PATCH, 1).unfold(2, PATCH, 1).reshape(len(pixels), GRID**2, PATCH**2)
    features = (features - pixels.mean()) / pixels.std()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    digits = torch.tensor(data.target)
    parts = [Images(pixels[i], features[i], digits[i].tolist()) for i in (order[held_out:], order[:held_out])]
    return parts[0], parts[1]
