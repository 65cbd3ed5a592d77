"""A batch's images, however they were given, to the memory that every layer of the forward reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memvp_kernels.models.memory import vision_tower as vision
from memvp_kernels.models.memory.images import ImageFeatures, Pixels, encode_pixels, pad_features
from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.parallel.tensor_parallel import own_slots, tensor_mesh
from memvp_kernels.models.patching.attach import hidden_dtype
from memvp_kernels.torch_op import autocast_dtype, narrow

if TYPE_CHECKING:
    from memvp_kernels.models.model import MemVPModel

__all__ = ["features_of", "memory_of", "samples_of"]


def samples_of(inputs: dict[str, Any]) -> int:
    """B, from whichever of the language model's inputs is there; a generation from nothing has one sample."""
    for name in ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "labels", "attention_mask"):
        tensor = inputs.get(name)
        if tensor is not None:
            return int(tensor.shape[0])
    encoded = inputs.get("encoder_outputs")
    return 1 if encoded is None else int(encoded[0].shape[0])


def memory_of(
    model: MemVPModel,
    samples: int,
    image_features: ImageFeatures | None,
    pixel_values: Pixels | None,
    visual_core: Tensor | None,
    visual_index: Tensor | None,
) -> tuple[Memory, Tensor | None]:
    """The memory of a batch, and the row that each sample reads: (samples,) int32, or None where sample i reads row i.

    Args:
        model: the MemVPModel.
        samples: B.
        image_features, pixel_values, visual_core, visual_index: as :meth:`MemVPModel.forward` takes them.

    Raises:
        TypeError, ValueError: images that do not fit the adapter or the batch.
        RuntimeError: the model was unloaded.
    """
    if model._attachment is None:
        raise RuntimeError("this MemVPModel was unloaded; wrap its language_model again, or call that")
    given = {"image_features": image_features, "pixel_values": pixel_values, "visual_core": visual_core}
    names = [name for name, images in given.items() if images is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} were given; they are ways to say the same thing, pass one")
    if visual_index is not None:
        _check_index(visual_index, samples)
    if visual_core is not None:
        core = _checked_core(model, visual_core)
        images = core.shape[0]
    else:
        features, valid = features_of(model, samples, image_features, pixel_values)
        images = features.shape[0]
    if visual_index is None and images != samples:
        raise ValueError(
            f"{names[0]}: {images} images for {samples} samples; give one entry per sample (None for no image), or say "
            "with visual_index which image each sample reads"
        )
    memory: Memory = model.memory(core=core) if visual_core is not None else model.memory(features, valid)
    dtype = hidden_dtype(model.language_model)
    if not torch.is_grad_enabled():  # under grad the sums stay wide
        memory = memory.to(dtype)
    memory = memory._replace(backend=model.backend, recompute=model.recompute, observer=model._observer)
    mesh, dtype = tensor_mesh(model.language_model), autocast_dtype(memory.core.device) or dtype
    # all once, outside the layers: what crosses the network backward then does so once per step
    if mesh is not None:
        memory = memory._replace(own=own_slots(memory, mesh).sharing(dtype))
    index = None if visual_index is None else narrow(visual_index.to(memory.core.device))
    return memory.sharing(dtype), index


def features_of(
    model: MemVPModel, samples: int, image_features: ImageFeatures | None, pixel_values: Pixels | None
) -> tuple[Tensor, Tensor]:
    """Features (R, n, vision_dim) and which of their rows are real, (R, n) bool."""
    clip = model.vision_model
    if pixel_values is not None:
        if clip is None:
            raise ValueError(
                "pixel_values: wanted a MemVPModel with vision_model=, got one without; pass image_features"
            )
        image_features = encode_pixels(clip, pixel_values)
    features, valid = pad_features(
        image_features,
        samples=samples,
        vision_dim=model.memvp_config.vision_dim,
        num_slots=model.memvp_config.num_slots,
        dtype=model.projector.fc1.weight.dtype,
        device=model.device,
    )
    shown = isinstance(image_features, Tensor) or any(entry is not None for entry in image_features or ())
    if clip is not None and not shown and torch.is_grad_enabled() and any(p.requires_grad for p in clip.parameters()):
        # no image in the whole batch: a blank one, on rows marked as padding, so that the vision model's adapters get zeros
        # and not None, and a sharded vision model takes part in the gathering of its blocks like the other ranks'
        blank = vision.encode(clip, vision.blank(clip))[:, :1]
        features = blank.to(features).expand(features.shape[0], -1, -1)
    return features, valid


def _check_index(index: object, samples: int) -> None:
    """Values are the operator's to check."""
    wanted = f"wanted ({samples},) int32 or int64, the image of each sample"
    if not isinstance(index, Tensor):
        raise TypeError(f"visual_index: {wanted}, got {type(index).__name__}; torch.as_tensor makes a tensor of it")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"visual_index: {wanted}, got {index.dtype}; cast it with .int()")
    if tuple(index.shape) != (samples,):
        raise ValueError(f"visual_index: {wanted}, got {tuple(index.shape)}; -1 stands for no image")


def _checked_core(model: MemVPModel, core: object) -> Tensor:
    slots, rank = model.memvp_config.num_slots, model.projector.rank
    wanted = f"wanted (B, {slots}, {rank}) from encode_images"
    if not isinstance(core, Tensor):
        raise TypeError(f"visual_core: {wanted}, got {type(core).__name__}")
    if not core.is_floating_point():
        raise TypeError(f"visual_core: {wanted}, got {core.dtype}")
    if core.dim() != 3 or tuple(core.shape[1:]) != (slots, rank):
        raise ValueError(f"visual_core: {wanted}, got {tuple(core.shape)}")
    return core.to(model.device, model.projector.fc2.weight.dtype)
