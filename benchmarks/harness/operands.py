"""What an FFN with visual memory works on: its weights, and the memory of a batch in parts that every variant can use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.inputs import image_features
from harness.presets import Preset

__all__ = ["Adapter", "Parts", "Weights"]


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.gate


@dataclass(frozen=True)
class Parts:
    """The memory of a batch, factored: K_v = core·basis + key_position, V_v = core·basis + value_position.

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
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.core, self.basis, self.key_position, self.value_position

    def features(self) -> Tensor:
        """f = core·basis, (S, M, d)."""
        return self.core @ self.basis

    def map(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """The same memory with every tensor changed."""
        core, basis, key_position, value_position = (change(t) for t in self.tensors)
        return Parts(core, basis, key_position, value_position, self.scale)


class Adapter(nn.Module):
    """What MemVP trains: projector (Linear, SiLU, Linear) and positions, float32 as in the paper.

    The scales are such that memory and FFN contribute about equally to the output, so that a wrong memory cannot hide behind a
    right FFN in the correctness check; the paper's λ = 0.01 and s = 0.1 cost the same time.

    Args:
        preset: widths.
        slots: M.
        device: of the parameters.
        seed: of the initial values.
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
        """f(Z), (S, n, d): what the prompt-length model puts in front of its text."""
        return F.linear(F.silu(F.linear(features, self.fc1_weight, self.fc1_bias)), self.fc2_weight, self.fc2_bias)

    def parts(self, features: Tensor, *, dtype: torch.dtype) -> Parts:
        """The factored memory of a batch of image features (S, n, vision width), in the model's dtype; rows past n are free slots."""
        inner = F.silu(F.linear(features, self.fc1_weight, self.fc1_bias))
        rows = torch.cat([inner, inner.new_ones(*inner.shape[:-1], 1)], dim=-1)
        slots, rank = self.key_position.shape[0], self.preset.rank
        core = F.pad(rows, (0, rank - rows.shape[-1], 0, slots - rows.shape[1]))
        basis = torch.cat([self.fc2_weight.T, self.fc2_bias.unsqueeze(0)])
        basis = F.pad(basis, (0, 0, 0, rank - basis.shape[0]))
        return Parts(core, basis, self.key_position, self.value_position, self.scale).map(lambda t: t.to(dtype))

    def batch(self, images: int, visual_tokens: int) -> Tensor:
        """Image features (images, visual_tokens, vision width) on the parameters' device."""
        return image_features(
            images, visual_tokens, self.preset.vision_width, device=self.fc1_weight.device, dtype=torch.float32
        )
