"""A batch's images, however they were given, to the memory that every layer of the forward reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memvp_kernels.checks import autocast_dtype
from memvp_kernels.dispatch import materializing_pays
from memvp_kernels.models.memory.image_rows import ImageRows
from memvp_kernels.models.memory.images import (
    ImageFeatures,
    PaddedFeatures,
    Pixels,
    encode_pixels,
    pad_features,
    stack_pixels,
)
from memvp_kernels.models.memory.vision_tower import blank, encode
from memvp_kernels.models.memory.visual_memory import ClassToken, Memory, Readers, VisualMemory
from memvp_kernels.models.parallel.tensor_parallel import part_of, tensor_mesh
from memvp_kernels.models.patching.attach import hidden_dtype
from memvp_kernels.problem import narrow

__all__ = ["BatchMemory", "Images", "MemorySource"]


class Images(NamedTuple):
    """The images of a batch, in the ways that :meth:`MemVPModel.forward` takes them."""

    image_features: ImageFeatures | None = None
    pixel_values: Pixels | None = None
    visual_core: Tensor | None = None
    visual_index: Tensor | None = None


class BatchMemory(NamedTuple):
    """What a batch reads.

    Attributes:
        memory: for the layers.
        memory_index: (B,) int32, the row of it that each sample reads; None: sample i reads row i.
        class_token: of each sample, for its prompt; None: nothing of an image goes there.
    """

    memory: Memory
    memory_index: Tensor | None
    class_token: ClassToken | None


class MemorySource(NamedTuple):
    """What a batch's memory is made from.

    Attributes:
        module: the VisualMemory, possibly inside a data-parallel wrapper; called as a module, which is where sharding
            gathers its parameters.
        memory: the VisualMemory itself.
        vision_model: for pixels.
        language_model: that will read it.
    """

    module: nn.Module
    memory: VisualMemory
    vision_model: nn.Module | None
    language_model: nn.Module

    def tensors(self, images: Images) -> Images:
        """The images, with tensors in place of lists."""
        features, pixels = images.image_features, images.pixel_values
        if isinstance(features, (list, tuple)) and (self.vision_model is None or _any(features)):
            features = self._padded(features, 0)
        if isinstance(pixels, (list, tuple)) and _any(pixels):
            pixels = stack_pixels(pixels)
            if pixels is not None:
                torch._dynamo.maybe_mark_dynamic(pixels.pixels, 0)
        return images._replace(image_features=features, pixel_values=pixels)

    def _padded(self, features: ImageFeatures | None, samples: int) -> PaddedFeatures:
        config = self.memory.config
        return pad_features(
            features,
            samples=samples,
            vision_dim=config.vision_dim,
            num_slots=config.num_slots,
            dtype=self.memory.projector.fc1.weight.dtype,
            device=self.memory.key_position.device,
            rows=ImageRows.wanted(config),
        )

    def features(self, samples: int, images: Images) -> tuple[Tensor, Tensor]:
        """Features (R, n, vision_dim) and which of their rows are real, (R, n) bool."""
        clip = self.vision_model
        features = images.image_features
        if images.pixel_values is not None:
            if clip is None:
                raise ValueError(
                    "pixel_values: wanted a MemVPModel with vision_model=, got one without; pass image_features"
                )
            features = encode_pixels(clip, images.pixel_values, ImageRows.wanted(self.memory.config))
        padded, valid = self._padded(features, samples)
        trains = clip is not None and torch.is_grad_enabled() and any(p.requires_grad for p in clip.parameters())
        if clip is not None and trains and not (isinstance(features, Tensor) or _any(features or ())):
            # no image in the whole batch: a blank one, on rows marked as padding, so that the vision model's adapters get
            # zeros and not None, and a sharded vision model takes part in the gathering of its blocks like the other ranks'
            unseen = encode(clip, blank(clip))[:, :1]
            padded = unseen.to(padded).expand(padded.shape[0], 1 + self.memory.config.class_token, -1)
        return padded, valid

    def core(self, images: Images) -> Tensor:
        """(R, M, r): the cores of all images, in the projector's dtype; (R, 1 + M, r) with a class token."""
        memory: Memory = self.module(*self.features(0, images))
        return memory.core if memory.class_token is None else torch.cat([memory.class_token.core, memory.core], dim=1)

    def read(self, inputs: dict[str, Any], images: Images, *, layers: int, **options: Any) -> BatchMemory:
        """The memory of a batch.

        Args:
            inputs: the language model's.
            images: of the batch.
            layers: how many will read it.
            **options: fields of :class:`Memory`.

        Raises:
            TypeError, ValueError: images that do not fit the adapter or the batch.
        """
        samples = _samples_of(inputs)
        given = [name for name in Images._fields[:3] if getattr(images, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given; they are ways to say the same thing, pass one")
        if images.visual_index is not None:
            _check_index(images.visual_index, samples)
        if images.visual_core is not None:
            core = self._checked_core(images.visual_core)
            rows = core.shape[0]
        else:
            features, valid = self.features(samples, images)
            rows = features.shape[0]
        if images.visual_index is None and rows != samples:
            raise ValueError(
                f"{given[0]}: {rows} images for {samples} samples; give one entry per sample (None for no image), or say "
                "with visual_index which image each sample reads"
            )
        memory: Memory = self.module(core=core) if images.visual_core is not None else self.module(features, valid)
        token, memory = memory.class_token, replace(memory, class_token=None)
        dtype = hidden_dtype(self.language_model)
        if not torch.is_grad_enabled():  # under grad the sums stay wide
            memory = memory.to(dtype)
        memory = replace(memory, readers=Readers(), **options)
        mesh, dtype = tensor_mesh(self.language_model), autocast_dtype(memory.core.device) or dtype
        # all once, outside the layers: what crosses the network backward then does so once per step
        if mesh is not None:
            memory = replace(memory, shard=part_of(memory, mesh).sharing(dtype))
        index = None if images.visual_index is None else narrow(images.visual_index.to(memory.core.device))
        if token is not None and index is not None:
            token = _of_samples(token, index)
        return BatchMemory(memory.sharing(dtype, _materializing_pays(memory, inputs, layers)), index, token)

    def _checked_core(self, core: object) -> Tensor:
        config, rank = self.memory.config, self.memory.projector.rank
        slots = config.num_slots + config.class_token
        wanted = f"wanted (B, {slots}, {rank}) from encode_images"
        if not isinstance(core, Tensor):
            raise TypeError(f"visual_core: {wanted}, got {type(core).__name__}")
        if not core.is_floating_point():
            raise TypeError(f"visual_core: {wanted}, got {core.dtype}")
        if core.dim() != 3 or tuple(core.shape[1:]) != (slots, rank):
            raise ValueError(f"visual_core: {wanted}, got {tuple(core.shape)}")
        return core.to(self.memory.key_position.device, self.memory.projector.fc2.weight.dtype)


def _of_samples(token: ClassToken, index: Tensor) -> ClassToken:
    """Each sample's class token, from each image's."""
    rows = token.present.shape[0]
    index = torch.where((index >= 0) & (index < rows), index, rows)  # the last row below stands for none
    return ClassToken(*(torch.cat([t, t.new_zeros(1, *t.shape[1:])])[index] for t in token))


def _materializing_pays(memory: Memory, inputs: dict[str, Any], layers: int) -> bool:
    """Whether Kv and Vv should be formed once for all layers, from the inputs' length, on a CPU."""
    if memory.core.device.type != "cpu" or memory.backend not in ("auto", "torch") or torch.compiler.is_compiling():
        return False
    first = next((inputs[n] for n in ("input_ids", "inputs", "inputs_embeds") if inputs.get(n) is not None), None)
    if first is None or first.dim() < 2:
        return False
    images, slots, rank = memory.core.shape
    rows, width = first.shape[0] * first.shape[1], memory.basis.shape[1]
    return materializing_pays(rows, images=images, slots=slots, rank=rank, width=width, calls=layers)


def _samples_of(inputs: dict[str, Any]) -> int:
    """B, from whichever of the language model's inputs is there; a generation from nothing has one sample."""
    for name in ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "labels", "attention_mask"):
        tensor = inputs.get(name)
        if tensor is not None:
            return tensor.shape[0]  # no int(): torch.export would fix the batch
    encoded = inputs.get("encoder_outputs")
    return 1 if encoded is None else encoded[0].shape[0]


def _any(entries: Iterable[object]) -> bool:
    return any(entry is not None for entry in entries)


def _check_index(index: object, samples: int) -> None:
    """Values are the operator's to check."""
    if not isinstance(index, Tensor):
        raise TypeError(_wanted_index(samples, f"{type(index).__name__}; torch.as_tensor makes a tensor of it"))
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(_wanted_index(samples, f"{index.dtype}; cast it with .int()"))
    if index.dim() != 1 or index.shape[0] != samples:
        raise ValueError(_wanted_index(samples, f"{tuple(index.shape)}; -1 stands for no image"))


def _wanted_index(
    samples: int, got: str
) -> str:  # not before it is needed: torch.compile would fix a batch put into text
    return f"visual_index: wanted ({samples},) int32 or int64, the image of each sample, got {got}"
