"""f: image features to the language model's width, and the factors that it falls into."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # quantize_ passes over it

__all__ = ["Projector"]

_RANK_MULTIPLE = 8  # tensor cores and 16-byte loads want the rank in whole eights


class Projector(nn.Module):
    """f(Z) = fc2(silu(fc1(Z))), one for all layers (paper, section 3.2).

    fc2 is linear, so f(Z) = A·W exactly, with A = [silu(fc1(Z)) | 1 | 0] (n, r) of an image and
    W = [fc2.weightᵀ; fc2.bias; 0] (r, d) shared by all of them; r is projector_dim + 1 padded to a multiple of 8.

    Args:
        vision_dim: width of an image feature.
        projector_dim: inner width.
        width: d, the language model's hidden size.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        vision_dim: int,
        projector_dim: int,
        width: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = NonDynamicallyQuantizableLinear(vision_dim, projector_dim, dtype=dtype, device=device)
        self.fc2 = NonDynamicallyQuantizableLinear(projector_dim, width, dtype=dtype, device=device)

    @property
    def rank(self) -> int:
        """r, the padded rank of the factors."""
        return -(-(self.fc2.in_features + 1) // _RANK_MULTIPLE) * _RANK_MULTIPLE

    def forward(self, features: Tensor) -> Tensor:
        """f(Z): (…, vision_dim) to (…, d), before λ."""
        out: Tensor = self.fc2(F.silu(self.fc1(features)))
        return out

    def factors(self, features: Tensor, valid: Tensor) -> Tensor:
        """A, the rows of an image's core.

        Args:
            features: (…, n, vision_dim).
            valid: (…, n) bool; rows that hold no visual token become zero rows, whose slot is then free memory.

        Returns:
            (…, n, r).
        """
        inner = F.silu(self.fc1(features))
        one = inner.new_ones(*inner.shape[:-1], 1)
        rows = torch.cat([inner, one], dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)
        return F.pad(rows, (0, self.rank - rows.shape[-1]))

    def basis(self) -> Tensor:
        """W, (r, d), before λ."""
        rows = torch.cat([self.fc2.weight.T, self.fc2.bias.unsqueeze(0)])
        return F.pad(rows, (0, 0, 0, self.rank - rows.shape[0]))
