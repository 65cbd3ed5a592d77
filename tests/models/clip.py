"""A tiny CLIP vision model, and an official checkpoint file for tiny or real sizes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

BLOCKS, INNER = 3, 4


def vision_model(width: int = 12, seed: int = 0, **extra: Any) -> CLIPVisionModel:
    """Three blocks, four 4 × 4 patches of an 8 × 8 image; weights large enough for every part to be seen."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 20,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    model = CLIPVisionModel(CLIPVisionConfig(**config | extra)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def pixels(count: int, seed: int = 4) -> Tensor:
    """(count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def official_state(
    slots: int, width: int, vision: int, projector: int, *, blocks: int = BLOCKS, inner: int = INNER, seed: int = 5
) -> dict[str, Tensor]:
    """The ``'model'`` entry, float32, all of it random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "adapter_emb1": (1, slots, width),
        "adapter_emb2": (1, slots, width),
        "adapter_proj.fc1.weight": (projector, vision),
        "adapter_proj.fc1.bias": (projector,),
        "adapter_proj.fc2.weight": (width, projector),
        "adapter_proj.fc2.bias": (width,),
        "adapter_modality_embedding.weight": (2, width),
    }
    for block in range(blocks):
        prefix = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp"
        shapes |= {f"{prefix}.fc1.weight": (inner, vision), f"{prefix}.fc2.weight": (vision, inner)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adem_vl_state(*sizes: int, class_token: bool = True, **options: int) -> dict[str, Tensor]:
    """ADEM-VL's, of the same sizes: a second projector, and no unused embedding."""
    state = official_state(*sizes, **options)
    del state["adapter_modality_embedding.weight"]
    other = official_state(*sizes, **options | {"seed": 6})
    token = {name.replace("proj.", "proj_cls."): t for name, t in other.items() if name.startswith("adapter_proj.")}
    return state | token if class_token else state


def save_official(path: Path, state: dict[str, Tensor], *, prefix: str = "module.", **settings: Any) -> Path:
    """The whole file as the official training loop writes it: optimizer, epoch, scaler and a Namespace beside the model."""
    weights = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    weights[0].grad = torch.ones(3)
    optimizer.step()
    saved = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 19,
        "scaler": {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 7,
        },
        "args": argparse.Namespace(
            **{"emb": state["adapter_emb1"].shape[1], "adapter_scale": 0.1, "llm_model": "7B"} | settings
        ),
    }
    torch.save(saved, path)
    return path
