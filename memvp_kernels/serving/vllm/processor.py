"""Requests' images on the way in: pictures, ready features or cores become tensors, and no token is added to the prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from memvp_kernels.serving.vllm.folder import ServedFolder

__all__ = ["DummyInputs", "ProcessingInfo", "Processor"]

#: What a request's dict may hold, one of them.
READY = ("image_features", "visual_core")
_FIELDS = {name: MultiModalFieldConfig.batched("image") for name in ("pixel_values", *READY)}


class ReadyImages(ModalityDataItems[Any, Mapping[str, Tensor]]):
    """Images that come as tensors, one dict each, already checked."""

    def get_count(self) -> int:
        return len(self.data)

    def get(self, index: int) -> Mapping[str, Tensor]:
        item: Mapping[str, Tensor] = self.data[index]
        return item

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {}


class DataParser(MultiModalDataParser):
    """vLLM's parser of pictures, and tensors of known shape beside it."""

    def __init__(self, folder: ServedFolder) -> None:
        super().__init__()
        self._folder = folder

    def _parse_image_data(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            data = [data]
        if isinstance(data, Sequence) and data and all(isinstance(item, Mapping) for item in data):
            return ReadyImages([self._checked(item) for item in data], "image")
        if self.is_embeddings(data) or isinstance(data, Tensor):
            raise ValueError(
                "image: wanted a picture, {'image_features': tensor} or {'visual_core': tensor}, got a bare tensor; say which it is"
            )
        return super()._parse_image_data(data)

    def _checked(self, item: Mapping[str, Any]) -> dict[str, Tensor]:
        """One tensor of the right shape, without the leading dimension of one that users may leave there."""
        if len(item) != 1 or next(iter(item)) not in READY:
            raise ValueError(f"image: wanted a dict with one of {', '.join(READY)}, got {sorted(item)}")
        (name, tensor), config = next(iter(item.items())), self._folder.config
        rows = config.num_slots
        wanted = (
            f"(n, {config.vision_dim}), n ≤ {rows}"
            if name == "image_features"
            else f"({rows}, {self._folder.rank}) from encode_images"
        )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: wanted floating-point {wanted}, got {got}")
        tensor = tensor.squeeze(0) if tensor.dim() == 3 else tensor
        fits = tensor.dim() == 2 and (
            tensor.shape[1] == config.vision_dim and 0 < tensor.shape[0] <= rows
            if name == "image_features"
            else tuple(tensor.shape) == (rows, self._folder.rank)
        )
        if not fits:
            raise ValueError(f"{name}: wanted {wanted}, got {tuple(tensor.shape)}")
        return {name: tensor}


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about images: at most one a request, which takes one entry of the encoder cache."""

    @property
    def folder(self) -> ServedFolder:
        """The folder that is served."""
        return ServedFolder.of(self.ctx.model_config.model)

    def get_data_parser(self) -> MultiModalDataParser:
        return DataParser(self.folder)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": 1}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """What vLLM profiles with: the largest image there is."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any = None) -> dict[str, Any]:
        config = self.info.folder.config
        image = {"image_features": torch.zeros(config.num_slots, config.vision_dim)}
        return {"image": [image] * mm_counts.get("image", 0)}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Images beside a prompt that stays as it is.

    The image is said to stand at the prompt's own first token. So its hash is in the hash of the first KV block, and through the
    chain of hashes in all that follow: no two images ever share a block.
    """

    requires_tokenizer = False

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        return _FIELDS

    def _get_prompt_updates(self, *arguments: Any, **options: Any) -> Sequence[Any]:
        return []

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """vLLM's hook: token ids and images to what the engine takes."""
        items = inputs.mm_data_items["image"]
        data: dict[str, Any]
        if isinstance(items, ReadyImages):
            names = {name for item in items.data for name in item}
            data = {name: [item[name] for item in items.data if name in item] for name in names}
        else:
            data = {"pixel_values": self._pixels(items.get_all())}
        kwargs = MultiModalKwargsItems.from_hf_inputs(BatchFeature(data), _FIELDS)
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hashes = inputs.get_mm_hashes(self.info.model_id, algorithm)
        return mm_input(
            prompt_token_ids=list(inputs.prompt),
            mm_kwargs=kwargs,
            mm_hashes=hashes,
            mm_placeholders={"image": [PlaceholderRange(offset=0, length=1)] * len(items)},
        )

    def _pixels(self, pictures: Sequence[Any]) -> Tensor:
        folder = self.info.folder
        if folder.vision is None:
            raise ValueError(
                "image: this model was saved without a vision model, so it takes {'image_features': tensor} or "
                "{'visual_core': tensor}, not pictures; save it with vision_model="
            )
        processor = _image_processor(str(folder.vision))
        pictures = [getattr(picture, "media", picture).convert("RGB") for picture in pictures]
        pixels: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels


@functools.cache
def _image_processor(folder: str) -> Any:
    return AutoImageProcessor.from_pretrained(folder)
