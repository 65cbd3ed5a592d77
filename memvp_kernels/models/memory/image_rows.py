"""Which rows an image's features become: themselves, or average-pooled grids of them, behind a class token or not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.models.config import MemVPConfig

__all__ = ["ONE_IMAGE", "ImageRows"]

ONE_IMAGE = "wanted one image per sample, since it has one class token and its grids fill the slots"


class ImageRows(NamedTuple):
    """What is kept of an image.

    Attributes:
        grids: cells of each square grid that its patches are pooled to; (): the patches.
        class_token: the first of its rows is the class token.
    """

    grids: tuple[int, ...] = ()
    class_token: bool = False

    @classmethod
    def wanted(cls, config: MemVPConfig) -> ImageRows:
        """By a configuration."""
        return cls(config.pooled_grids, config.class_token)

    @property
    def one_image(self) -> bool:
        """Whether a sample can have only one."""
        return bool(self.grids) or self.class_token

    def of(self, features: Tensor, name: str) -> Tensor:
        """An image's rows.

        Args:
            features: (…, n, vision_dim), the class token first if there is one, then a square grid of patches row by row.
            name: of the argument, for an error.

        Returns:
            (…, rows, vision_dim); each grid is average-pooled from the patches (torch.nn.functional.adaptive_avg_pool2d).

        Raises:
            ValueError: no class token, or patches that are no square.
        """
        first = int(self.class_token)
        patches = features.shape[-2] - first
        if patches < 0:
            raise ValueError(f"{name}: wanted the class token's row first, got {tuple(features.shape)}")
        if not self.grids:
            return features
        side = math.isqrt(patches)
        if side * side != patches or not patches:
            token = "a class token and " * first
            raise ValueError(f"{name}: wanted {token}a square grid of patches to pool, got {features.shape[-2]} rows")
        grid = features[..., first:, :].mT.reshape(*features.shape[:-2], -1, side, side)
        pooled = [F.adaptive_avg_pool2d(grid, math.isqrt(cells)).flatten(-2).mT for cells in self.grids]
        return torch.cat([features[..., :first, :], *pooled], dim=-2)
