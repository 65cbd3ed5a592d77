"""ADEM-VL by its official formulas, sample by sample, on a plain copy of a language model; shares no code with the package."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel
from tests.models.tiny import VISION, language_model, with_memory

BOS, SIDE, GRIDS = 1, 4, (9, 4)
CONFIG = MemVPConfig.adem_vl(
    vision_dim=VISION, projector_dim=6, pooled_grids=GRIDS, feature_scale=0.5, memory_scale=0.7, visual_drop=0.3
)
PREFIXED = dataclasses.replace(CONFIG, image_prefix=(5, 6), text_prefix=(5, 6, 7, 8))


def wrapped(family: str = "llama", config: MemVPConfig = CONFIG, **options: Any) -> MemVPModel:
    """In eval mode, with random, large memory."""
    return with_memory(language_model(family), config, **options)


def images(*there: bool, seed: int = 3) -> list[Tensor | None]:
    """Per sample a class token and SIDE × SIDE patches, or None."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + SIDE * SIDE, VISION, generator=generator) if t else None for t in there]


class Official:
    """The official model's vision side: leaves in float64, and what it adds to an FFN and to a prompt."""

    def __init__(self, model: MemVPModel) -> None:
        self.config = model.memvp_config
        state = model.adapter_state_dict()
        self.leaves = {name: t.detach().double().requires_grad_() for name, t in state.items()}

    def projector(self, name: str, z: Tensor) -> Tensor:
        w1, b1, w2, b2 = (
            self.leaves[f"{name}.{part}"] for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        )
        return F.silu(z @ w1.T + b1) @ w2.T + b2

    def image_embeds(self, image: Tensor | None) -> Tensor:
        if image is None:
            return torch.zeros(1, sum(self.config.pooled_grids), self.leaves["key_position"].shape[-1]).double()
        grid = image[1:].double().T.reshape(1, -1, SIDE, SIDE)
        pooled = [_average(grid, math.isqrt(cells)) for cells in self.config.pooled_grids]
        return self.config.feature_scale * self.projector("projector", torch.cat(pooled, dim=1))

    def adapter(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        """adem/adapter.py, Adapter.forward; x is (1, L, d)."""
        key, value = (self.leaves[name].unsqueeze(0) for name in ("key_position", "value_position"))
        x = F.silu(x) @ F.silu(image_embeds + key).permute(0, 2, 1)
        score, _ = x.sort(dim=2)
        threshold = score[:, :, int(self.config.visual_drop * score.size(2))].unsqueeze(2)
        mask = torch.ones_like(x)
        mask[torch.where(x < threshold.expand_as(x))] = 0
        return (x * mask) @ (image_embeds + value)


def _average(grid: Tensor, side: int) -> Tensor:
    """Adaptive average pooling by its definition: cell i spans floor(i n / m) to ceil((i + 1) n / m)."""
    n = grid.shape[-1]
    spans = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    cells = [grid[..., a:b, c:d].mean(dim=(-2, -1)) for a, b in spans for c, d in spans]
    return torch.stack(cells, dim=1)


def official_forward(
    base: nn.Module, model: MemVPModel, ids: Sequence[Tensor], pictures: Sequence[Tensor | None]
) -> tuple[list[Tensor], Official]:
    """Each prompt's logits in float64, columns as given: column i predicts token i + 1."""
    official = Official(model)
    config, found = model.memvp_config, []
    for row, image in zip(ids, pictures, strict=True):
        lm: Any = copy.deepcopy(base).double()
        embed = lm.get_input_embeddings()
        image_embeds = official.image_embeds(image)
        for module in lm.modules():
            if type(module).__name__.endswith("MLP"):
                module.register_forward_hook(
                    lambda mlp, args, y, e=image_embeds: y + config.memory_scale * official.adapter(args[0], e)
                )
        start = 1 if row[0] == BOS else 0
        prefix = torch.tensor(config.text_prefix if image is None else config.image_prefix, dtype=torch.long)
        parts = [embed(row[:start]), embed(prefix)]
        if image is not None:
            parts.append(official.projector("class_projector", image[:1].double()))
        embeds = torch.cat([*parts, embed(row[start:])])
        logits = lm(inputs_embeds=embeds[None]).logits[0]
        # token i + 1 is predicted from whatever is directly in front of it
        new = len(embeds) - len(row)
        found.append(torch.stack([logits[i if i + 1 < start else i + new] for i in range(len(row))]))
    return found, official


def batch(pictures: Sequence[Tensor | None], lengths: Sequence[int], *, left: bool = False) -> dict[str, Any]:
    """Padded prompts of these lengths, every second without BOS, with labels."""
    generator = torch.Generator().manual_seed(2)
    longest = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.long),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for i, length in enumerate(lengths):
        row = torch.randint(9, 40, (length,), generator=generator)
        if i % 2 == 0:
            row[0] = BOS
        columns = slice(longest - length, longest) if left else slice(0, length)
        ids[i, columns], mask[i, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "image_features": list(pictures)}


def rows(inputs: dict[str, Any]) -> list[Tensor]:
    """The prompts without padding."""
    return [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
