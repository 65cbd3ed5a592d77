"""Image features as users have them, one tensor or one entry per sample, as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from memvp_kernels.models.memory.image_rows import ONE_IMAGE, ImageRows
from memvp_kernels.models.memory.vision_tower import encode

__all__ = [
    "ImageFeatures",
    "PaddedFeatures",
    "Pixels",
    "StackedPixels",
    "encode_pixels",
    "pad_features",
    "stack_pixels",
]


class PaddedFeatures(NamedTuple):
    """A batch's features as two tensors, whichever of its samples have an image: one graph under torch.compile.

    Attributes:
        features: (B, n, vision_dim).
        valid: (B, n) bool, False on padding.
    """

    features: Tensor
    valid: Tensor


class StackedPixels(NamedTuple):
    """A batch's images as two tensors.

    Attributes:
        pixels: (images, 3, H, W).
        place: (B, k) int64, the images of each sample; ``len(pixels)`` stands for none.
    """

    pixels: Tensor
    place: Tensor


_PATCHES = ImageRows()

ImageFeatures: TypeAlias = "PaddedFeatures | Tensor | Sequence[Tensor | Sequence[Tensor] | None]"
Pixels: TypeAlias = "StackedPixels | Tensor | Sequence[Tensor | None]"


def encode_pixels(vision_model: nn.Module, pixel_values: Pixels, rows: ImageRows = _PATCHES) -> ImageFeatures:
    """Image features of pixels, all images of the batch in one pass.

    Args:
        vision_model: a transformers CLIPVisionModel.
        pixel_values: (B, 3, H, W); or one entry per sample: (3, H, W), (k, 3, H, W) for k images, or None.
        rows: what is kept of an image.

    Returns:
        What :func:`pad_features` takes, shaped like ``pixel_values``.

    Raises:
        TypeError: an entry is something else.
        ValueError: an entry has another shape, or several images where there can be one.
    """
    stacked = pixel_values if isinstance(pixel_values, Tensor) else stack_pixels(pixel_values)
    if stacked is None:
        return [None] * len(pixel_values)
    pixels = stacked if isinstance(stacked, Tensor) else stacked.pixels
    # through a frozen vision model the pixels themselves may be what is asked about (a saliency map, an attack)
    trains = pixels.requires_grad or any(p.requires_grad for p in vision_model.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        features = encode(vision_model, pixels, class_token=rows.class_token)
    if isinstance(stacked, Tensor):
        return features
    if rows.one_image and stacked.place.shape[1] > 1:
        raise ValueError(f"pixel_values: {ONE_IMAGE}, got up to {stacked.place.shape[1]}")
    features = rows.of(features, "pixel_values")
    absent = features.new_zeros(1, *features.shape[1:])
    placed = torch.cat([features, absent])[stacked.place]  # (B, k, patches, vision_dim)
    valid = (stacked.place < features.shape[0]).unsqueeze(-1).expand(placed.shape[:3])
    return PaddedFeatures(placed.flatten(1, 2), valid.flatten(1, 2))


def stack_pixels(pixel_values: StackedPixels | Sequence[Tensor | None]) -> StackedPixels | None:
    """One entry per sample as two tensors; None where no sample has an image."""
    if isinstance(pixel_values, StackedPixels):
        return pixel_values
    images = [_images(entry, i) for i, entry in enumerate(pixel_values)]
    given = [entry for entry in images if entry is not None]
    if not given:
        return None
    sizes = {tuple(entry.shape[1:]) for entry in given}
    if len(sizes) > 1:
        raise ValueError(f"pixel_values: wanted images of one size, got {sorted(sizes)}; resize them")
    counts = [0 if entry is None else len(entry) for entry in images]
    total = sum(counts)
    numbers = iter(range(total))
    place = [[next(numbers) for _ in range(n)] + [total] * (max(counts) - n) for n in counts]
    return StackedPixels(torch.cat(given), torch.tensor(place, device=given[0].device))


def _images(entry: Tensor | None, i: int) -> Tensor | None:
    if entry is None:
        return None
    if not isinstance(entry, Tensor):
        raise TypeError(f"pixel_values[{i}]: wanted a tensor or None, got {type(entry).__name__}")
    if entry.dim() not in (3, 4):
        raise ValueError(f"pixel_values[{i}]: wanted (3, H, W) or (k, 3, H, W), got {tuple(entry.shape)}")
    return entry if entry.dim() == 4 else entry.unsqueeze(0)


def pad_features(
    features: ImageFeatures | None,
    *,
    samples: int,
    vision_dim: int,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
    rows: ImageRows = _PATCHES,
) -> PaddedFeatures:
    """One batch of features with the rows that are real marked.

    A sample without an image is a row of zeros marked as padding, and so is every sample of a text-only batch: the
    projector always runs, and its gradients are zeros rather than missing, which distributed training relies on.

    Args:
        features: (B, n, vision_dim); or one entry per sample, (n_i, vision_dim), a list of those (several images,
            concatenated), or None; or None: no images at all.
        samples: how many samples a batch without images has.
        vision_dim: wanted width.
        num_slots: M.
        dtype: of the result.
        device: of the result.
        rows: what becomes of an image's features; with a class token, the result has its row first.

    Returns:
        (B, n, vision_dim) and (B, n) bool; a list is padded to n = M, or M + 1 with a class token.

    Raises:
        TypeError: something else than the above.
        ValueError: a wrong shape, more visual tokens than slots, or several images where there can be one.
    """
    first = int(rows.class_token)
    most = num_slots + first
    if features is None:
        return PaddedFeatures(
            torch.zeros(samples, 1 + first, vision_dim, dtype=dtype, device=device),
            torch.zeros(samples, 1 + first, dtype=torch.bool, device=device),
        )
    if isinstance(features, Tensor):
        if features.dim() != 3:
            raise ValueError(f"image_features: wanted (B, n, {vision_dim}), got {tuple(features.shape)}")
        features = _rows(features, "image_features", vision_dim, most, rows)
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=device)
        return PaddedFeatures(features.to(device, dtype), valid)
    if isinstance(features, PaddedFeatures):
        _check(features.features, "image_features", vision_dim, most)
        return PaddedFeatures(features.features.to(device, dtype), features.valid.to(device))
    if not isinstance(features, Sequence) or isinstance(features, str):
        raise TypeError(
            f"image_features: wanted a tensor, a list with one entry per sample or None, got {type(features).__name__}"
        )
    entries = [_entry(entry, i, vision_dim, most, rows) for i, entry in enumerate(features)]
    # to all slots and not to the longest entry: one shape for every batch
    padded = torch.zeros(len(entries), most, vision_dim, dtype=dtype, device=device)
    valid = torch.zeros(len(entries), most, dtype=torch.bool, device=device)
    for i, entry in enumerate(entries):
        if entry is not None:
            padded[i, : entry.shape[0]] = entry.to(device, dtype)
            valid[i, : entry.shape[0]] = True
    return PaddedFeatures(padded, valid)


def _entry(
    entry: Tensor | Sequence[Tensor] | None, i: int, vision_dim: int, most: int, rows: ImageRows
) -> Tensor | None:
    name = f"image_features[{i}]"
    if entry is None:
        return None
    if not isinstance(entry, Tensor):
        if not isinstance(entry, Sequence) or not all(isinstance(image, Tensor) for image in entry):
            raise TypeError(f"{name}: wanted a tensor, a list of tensors or None, got {type(entry).__name__}")
        if not entry:
            return None
        if rows.one_image and len(entry) > 1:
            raise ValueError(f"{name}: {ONE_IMAGE}, got {len(entry)}")
        for j, image in enumerate(entry):
            if image.dim() != 2:
                raise ValueError(f"{name}[{j}]: wanted (n, {vision_dim}), got {tuple(image.shape)}")
            if not rows.one_image:
                _check(image, f"{name}[{j}]", vision_dim, most)
        entry = torch.cat(list(entry))
    if entry.dim() != 2:
        raise ValueError(f"{name}: wanted (n, {vision_dim}), got {tuple(entry.shape)}")
    return _rows(entry, name, vision_dim, most, rows)


def _rows(features: Tensor, name: str, vision_dim: int, most: int, rows: ImageRows) -> Tensor:
    if features.is_floating_point() and features.shape[-1] == vision_dim:
        features = rows.of(features, name)
    _check(features, name, vision_dim, most)
    return features


def _check(features: Tensor, name: str, vision_dim: int, most: int) -> None:
    if not features.is_floating_point():
        raise TypeError(f"{name}: wanted floating-point features, got {features.dtype}; pixels go into pixel_values")
    if features.shape[-1] != vision_dim:
        raise ValueError(f"{name}: wanted width vision_dim = {vision_dim}, got {tuple(features.shape)}")
    if features.shape[-2] > most:
        raise ValueError(
            f"{name}: {features.shape[-2]} visual tokens do not fit {most} slots; pass fewer (smaller or fewer "
            "images, pooled features) or train with a larger num_slots"
        )
