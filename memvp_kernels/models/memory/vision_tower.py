"""Pixels to image features: the official feature selection, and the adapters that MemVP trains inside CLIP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvp_kernels.models.patching.patch import Reclassed, is_reclassed, reclass, restore

__all__ = [
    "ADAPTER_DIM",
    "ClipAdapter",
    "adapter_settings",
    "adapters",
    "attach_adapters",
    "blank",
    "detach_adapters",
    "encode",
    "freeze",
    "thaw",
    "tower",
]

ADAPTER_DIM = 12
"""Inner width of the official CLIP adapters."""

_TOWER = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


def encode(vision_model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Patch features as the official code selects them (paper, section 4.1).

    The hidden state of the last-but-one block, its class token dropped, under the post-layernorm; no projection. The
    last block is not run.

    Args:
        vision_model: a transformers CLIPVisionModel, or a model that holds one as ``vision_model``.
        pixel_values: (B, 3, height, width), preprocessed as that CLIP expects; cast to its dtype and device.

    Returns:
        (B, patches, vision width).

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower, or ``pixel_values`` not a floating-point tensor.
        ValueError: ``pixel_values`` is not (B, 3, height, width).
    """
    clip = tower(vision_model)
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        got = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"pixel_values must be a floating-point tensor, got {got}: normalise the image first")
    if pixel_values.dim() != 4:
        raise ValueError(f"pixel_values must be (B, channels, height, width), got shape {tuple(pixel_values.shape)}")
    patch = clip.embeddings.patch_embedding.weight
    h = clip.pre_layrnorm(clip.embeddings(pixel_values.to(patch)))
    for layer in clip.encoder.layers[:-1]:
        h = layer(h, attention_mask=None)
    features: Tensor = clip.post_layernorm(h[:, 1:])
    return features


def blank(vision_model: nn.Module) -> Tensor:
    """(1, 3, height, width) of zeros, an image for a batch that has none."""
    config: Any = tower(vision_model).config
    return torch.zeros(1, config.num_channels, config.image_size, config.image_size)


def freeze(vision_model: nn.Module) -> dict[str, bool]:
    """Freeze all but the adapters, which train; what :func:`thaw` needs to undo it.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
    """
    tower(vision_model)
    before = {name: parameter.requires_grad for name, parameter in vision_model.named_parameters()}
    vision_model.requires_grad_(False)
    for adapter in adapters(vision_model):
        adapter.requires_grad_(True)
    return before


def thaw(vision_model: nn.Module, before: dict[str, bool]) -> None:
    """Undo :func:`freeze`; parameters that came later stay as they are."""
    for name, parameter in vision_model.named_parameters():
        if name in before:
            parameter.requires_grad_(before[name])


class ClipAdapter(nn.Module):
    """fc2(dropout(gelu(fc1(h)))), no biases, beside a CLIP block's MLP; zero until trained, because fc2 is.

    Args:
        width: of the vision model.
        hidden_dim: inner width.
        dropout: of the inner activations, in training.
        dtype: of the parameters, which may be wider than the vision model's.
        device: of the parameters.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int = ADAPTER_DIM,
        *,
        dropout: float = 0.1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_dim, bias=False, dtype=dtype, device=device)
        self.fc2 = nn.Linear(hidden_dim, width, bias=False, dtype=dtype, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(…, width) to (…, width), computed in h's dtype."""
        inner = self.dropout(F.gelu(F.linear(h, self.fc1.weight.to(h.dtype))))
        return F.linear(inner, self.fc2.weight.to(h.dtype))


class _AdaptedMLP(Reclassed):
    """In front of a CLIP block's MLP: mlp(h) + scale · adapter(h). The block adds the residual, h being its ln_2 x."""

    adapter_mlp: ClipAdapter
    adapter_scale: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, tokens, width) to (B, tokens, width)."""
        own: Tensor = super().forward(hidden_states)
        return own + self.adapter_scale * self.adapter_mlp(hidden_states)


def attach_adapters(
    vision_model: nn.Module, *, hidden_dim: int = ADAPTER_DIM, scale: float = 0.1, dropout: float = 0.1
) -> list[ClipAdapter]:
    """Give every block that :func:`encode` runs an adapter; this instance only, its parameters keep their names.

    The output is unchanged until the adapters are trained. The adapters are trainable, float32 and new: call
    :func:`detach_adapters` first to start over.

    Args:
        vision_model: a transformers CLIPVisionModel, or a model that holds one as ``vision_model``.
        hidden_dim: inner width (official: 12).
        scale: multiplies the adapter's output (official: 0.1).
        dropout: of the inner activations, in training (official: 0.1).

    Returns:
        The adapters in the order of the blocks. The last block, which is never run, gets none.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
        ValueError: it has adapters already.
    """
    if adapters(vision_model):
        raise ValueError("vision_model has adapters already: detach_adapters(vision_model) takes them off")
    for mlp in _mlps(vision_model):
        weight = mlp.fc1.weight
        adapter = ClipAdapter(mlp.fc1.in_features, hidden_dim, dropout=dropout, device=weight.device)
        reclass(mlp, _AdaptedMLP)
        mlp.adapter_mlp = adapter.train(mlp.training)
        mlp.adapter_scale = scale
    return adapters(vision_model)


def detach_adapters(vision_model: nn.Module) -> None:
    """Undo :func:`attach_adapters`: same modules, same state_dict keys, same output. Without adapters, do nothing.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
    """
    for mlp in _mlps(vision_model):
        if _is_adapted(mlp):
            restore(mlp)
            del mlp.adapter_mlp, mlp.adapter_scale


def adapters(vision_model: nn.Module) -> list[ClipAdapter]:
    """The adapters in the order of the blocks; empty when there are none.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
    """
    return [mlp.adapter_mlp for mlp in _mlps(vision_model) if _is_adapted(mlp)]


def adapter_settings(vision_model: nn.Module) -> dict[str, float] | None:
    """What :func:`attach_adapters` was called with, scale and dropout; None when there are no adapters."""
    adapted = [mlp for mlp in _mlps(vision_model) if _is_adapted(mlp)]
    if not adapted:
        return None
    return {"dropout": adapted[0].adapter_mlp.dropout.p, "scale": float(adapted[0].adapter_scale)}


def _is_adapted(mlp: nn.Module) -> bool:
    return is_reclassed(mlp) and isinstance(mlp, _AdaptedMLP)


def _mlps(vision_model: nn.Module) -> list[Any]:
    return [layer.mlp for layer in tower(vision_model).encoder.layers[:-1]]


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
