"""Pixels to image features, selected as the official code does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.models.offloading import execution_device

__all__ = ["blank", "encode", "tower"]

_TOWER = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


def encode(vision_model: nn.Module, pixel_values: Tensor, *, class_token: bool = False) -> Tensor:
    """Patch features as the official code selects them (paper, section 4.1).

    The hidden state of the last-but-one block under the post-layernorm; no projection. The last block is not run.

    Args:
        vision_model: a transformers CLIPVisionModel, or a model that holds one as ``vision_model``.
        pixel_values: (B, 3, height, width), preprocessed as that CLIP expects; cast to its dtype and device.
        class_token: keep it, in front of the patches, as ADEM-VL does; MemVP drops it.

    Returns:
        (B, patches, vision width), one row more with the class token.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower, or ``pixel_values`` not a floating-point tensor.
        ValueError: ``pixel_values`` is not (B, 3, height, width).
    """
    clip = tower(vision_model)
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values must be a floating-point tensor, got {got}: normalize the image first")
    if pixel_values.dim() != 4:
        raise ValueError(f"pixel_values must be (B, channels, height, width), got shape {tuple(pixel_values.shape)}")
    patch = clip.embeddings.patch_embedding
    h = clip.pre_layrnorm(clip.embeddings(pixel_values.to(execution_device(patch), patch.weight.dtype)))
    for layer in clip.encoder.layers[:-1]:
        h = layer(h, attention_mask=None)
    features: Tensor = clip.post_layernorm(h if class_token else h[:, 1:])
    return features


def blank(vision_model: nn.Module) -> Tensor:
    """(1, 3, height, width) of zeros, an image for a batch that has none."""
    config: Any = tower(vision_model).config
    return torch.zeros(1, config.num_channels, config.image_size, config.image_size)


def tower(vision_model: nn.Module) -> Any:
    """The module that holds the embeddings and the blocks: the model itself or its ``vision_model``.

    Raises:
        TypeError: neither is a CLIP vision tower.
    """
    for module in (vision_model, getattr(vision_model, "vision_model", None)):
        if all(hasattr(module, name) for name in _TOWER):
            return module
    raise TypeError(
        f"vision_model must be a transformers CLIPVisionModel, got {type(vision_model).__name__}; "
        "for another vision model compute the features yourself and pass image_features="
    )
