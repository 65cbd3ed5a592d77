"""`MemVPModel`: a Hugging Face language model whose FFNs hold an image as key-value memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from transformers import GenerationMixin

from memvp_kernels.models.activation_checkpointing import ActivationCheckpointing
from memvp_kernels.models.assisted import DraftModel
from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.delegation import FLAGS, LanguageModelInterface, loss_per_item
from memvp_kernels.models.inputs import BatchMemory, Images, MemorySource
from memvp_kernels.models.io.adapter import Adapter
from memvp_kernels.models.io.pretrained import PretrainedAdapter
from memvp_kernels.models.measuring import Measuring
from memvp_kernels.models.memory.images import ImageFeatures, Pixels
from memvp_kernels.models.memory.projector import Projector
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.offloading import fetch
from memvp_kernels.models.parallel.data_loading import refuse_cut_images
from memvp_kernels.models.parallel.fsdp import like_forward
from memvp_kernels.models.patching.attach import Attachment, attach, check_all_read, detach, hidden_dtype, memory_ffns
from memvp_kernels.models.patching.mixins import MemoryFFN
from memvp_kernels.models.patching.vision_adapters import VisionTower
from memvp_kernels.models.relatives.adem_vl import PromptStart, refuse_unsuited
from memvp_kernels.models.scopes import Scopes

__all__ = ["MemVPModel"]


class MemVPModel(Measuring, PretrainedAdapter, LanguageModelInterface, ActivationCheckpointing, Scopes, nn.Module):
    """Memory-space visual prompting on a language model (Jie et al., ICML 2024, arXiv 2405.05615).

    Acts on this instance alone: its layers and FFNs are patched in place, parameter names and state_dict keys stay,
    and :meth:`unload` gives the model back. The language model is frozen; the projector and the positions train, in
    float32 whatever the model's dtype. The mode is the language model's, train or eval. A text-only sample of an untrained
    MemVPModel gets the language model's own output, up to rounding. Several threads may call one model at once.

    An image is computed once per forward, or once per generation, into a core (M, r); every layer reads that core
    through a basis (r, d) that all images share. It adds no token to the prompt: the text needs no placeholder and no words
    around it, only the template of training. ``MemVPConfig.adem_vl()`` makes ADEM-VL of it (arXiv 2410.17779), whose prompts begin
    with a class token that masks, labels, logits and generated sequences need not know of.

    The methods to know: forward, generate, encode_images, calibrate, explain_memory, disable_memory, save_pretrained,
    from_pretrained, load_official_checkpoint, unload. nn.Module's come last.

    Args:
        language_model: a transformers model of a supported family (LLaMA, Mistral, Qwen2, Qwen3, Gemma, T5, mT5, BART),
            or PEFT's wrapper around one.
        config: the adapter's shape and constants.
        vision_model: a transformers CLIPVisionModel for ``pixel_values``; frozen as well.
        backend: "auto", "torch", "triton" or "cuda", for every FFN.
        recompute: form the FFN's hidden again in the backward instead of keeping it.

    With transformers' Trainer, :class:`~.trainer.MemVPTrainer` makes checkpoints that hold what trains alone.

    Attributes:
        language_model: as given.
        vision_model: as given.
        memory: the module that holds everything trainable.
        memvp_config: ``config``.

    Raises:
        TypeError: ``language_model`` is no module, ``config`` not a MemVPConfig, or ``vision_model`` not a CLIP vision model.
        ValueError: a language model that is not supported, or already has memory; see :func:`~.attach.attach`.
    """

    def __init__(
        self,
        language_model: nn.Module,
        config: MemVPConfig,
        vision_model: nn.Module | None = None,
        *,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, MemVPConfig):
            raise TypeError(f"config: wanted a MemVPConfig, got {type(config).__name__}")
        tower = None if vision_model is None else VisionTower(vision_model)  # refused before anything is changed
        attachment = attach(language_model, config)
        try:
            if config.class_token:
                refuse_unsuited(language_model)
            memory = VisualMemory(
                config,
                width=attachment.width,
                layers=len(attachment.layers),
                dtype=torch.promote_types(hidden_dtype(language_model), torch.float32),
                device=attachment.device,
            )
        except Exception:  # no room for it, or no place for a class token
            detach(language_model, attachment.frozen)
            raise
        self._attachment: Attachment | None = attachment
        self.language_model: Any = language_model
        for name in FLAGS:
            if hasattr(language_model, name):
                setattr(self, name, getattr(language_model, name))
        self.vision_model = vision_model
        self._tower = tower
        if tower is not None:
            tower.freeze()
        self.memvp_config = config
        self.backend = backend
        self.recompute = recompute
        self.memory = memory
        self.training = language_model.training
        self.memory.train(self.training)

    @property
    def projector(self) -> Projector:
        """Features to width d, before λ."""
        return self._visual_memory().projector

    @property
    def key_position(self) -> nn.Parameter:
        """p^k: (M, d), or (layers, M, d) when not shared."""
        return self._visual_memory().key_position

    @property
    def value_position(self) -> nn.Parameter:
        """p^v: shaped like :attr:`key_position`."""
        return self._visual_memory().value_position

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.key_position.device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        image_features: ImageFeatures | None = None,
        pixel_values: Pixels | None = None,
        visual_core: Tensor | None = None,
        visual_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The language model's forward, with the batch's images in its FFNs.

        Args:
            input_ids, attention_mask, labels, position_ids, inputs_embeds, decoder_input_ids, decoder_attention_mask:
                the language model's.
            image_features: (B, n, vision_dim), n ≤ M; or a list with one entry per sample: (n_i, vision_dim), a list of
                tensors (several images, concatenated), or None (no image); or None: no images. For ADEM-VL the class token's
                feature and a square grid of patches, one image per sample.
            pixel_values: (B, 3, H, W), or a list with one entry per sample: (3, H, W), (k, 3, H, W) or None.
            visual_core: from :meth:`encode_images`, instead of features or pixels.
            visual_index: (B,) int32 or int64, which image each sample reads, -1 for none; then there may be any number of
                images. Default: image i belongs to sample i.
            **inputs: whatever else the language model takes.

        Returns:
            What the language model returns. ADEM-VL's attentions and cache hold the prompt's beginning as well; a later call
            that passes the cache counts the caller's columns alone, and its images again.

        Raises:
            TypeError, ValueError: images that do not fit the adapter or the batch.
            RuntimeError: reentrant activation checkpointing, which cannot share the memory between layers.
        """
        images = (image_features, pixel_values, visual_core, visual_index)
        if not torch.compiler.is_dynamo_compiling():
            images = _with_tensors(self, images)
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        return self._forward(given, inputs, images)

    # torch.compile starts below it: compiled, lists of images, which are tensors by then, are one graph whichever are missing
    skip_code(forward.__code__)

    def _forward(self, given: dict[str, Any], inputs: dict[str, Any], images: tuple[Any, ...]) -> Any:
        self._refuse_reentrant_checkpointing()
        inputs.update({name: tensor for name, tensor in given.items() if tensor is not None})
        items = inputs.pop("num_items_in_batch", None) if self.config.is_encoder_decoder else None
        output = self._run(self.language_model, inputs, Images(*images))
        labels = given["labels"]
        return output if items is None or labels is None else loss_per_item(output, labels, items)

    @like_forward
    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        image_features: ImageFeatures | None = None,
        pixel_values: Pixels | None = None,
        visual_core: Tensor | None = None,
        visual_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's generate(): sampling, beams, num_return_sequences and caches as ever.

        Args:
            inputs: (B, T) token ids; also as ``input_ids=``.
            image_features, pixel_values, visual_core, visual_index: as in :meth:`forward`.
            *args, **kwargs: generate()'s own, the second of which is a GenerationConfig.

        Returns:
            What generate() returns.

        A draft model (``assistant_model=``) that is a MemVPModel reads the same images by its own memory, another none.

        Raises:
            RuntimeError: in training mode with activation checkpointing on.
        """
        self._refuse_generation_in_training()
        # by name, since PEFT's wrappers of some models take no others
        names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
        kwargs.update({n: value for n, value in zip(names, (inputs, *args), strict=False) if value is not None})
        images = Images(image_features, pixel_values, visual_core, visual_index)
        if kwargs.get("assistant_model") is not None:
            kwargs["assistant_model"] = self._draft(kwargs["assistant_model"], kwargs, images)
        return self._run(self.language_model.generate, kwargs, images, generation=True)

    @like_forward
    def encode_images(
        self, image_features: ImageFeatures | None = None, *, pixel_values: Pixels | None = None
    ) -> Tensor:
        """The cores of images, to keep and to pass as ``visual_core=`` (a conversation, a cache, several questions).

        Args:
            image_features, pixel_values: as in :meth:`forward`; at least one.

        Returns:
            (B, M, r), for ADEM-VL (B, 1 + M, r): with a graph and in the projector's dtype where gradients are on; otherwise, to be kept, in the
            language model's, which is what its layers read.

        Raises:
            ValueError: no images.
        """
        if image_features is None and pixel_values is None:
            raise ValueError("encode_images: wanted image_features or pixel_values, got neither")
        core = self._source().core(Images(image_features, pixel_values))
        return core if torch.is_grad_enabled() else core.to(hidden_dtype(self.language_model))

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def unload(self) -> nn.Module:
        """Give the language model back as it was: same modules, classes, state_dict keys, trainable flags and outputs.

        The vision model too: its flags, and without the adapters that loading gave it.
        """
        if self._attachment is not None:
            detach(self.language_model, self._attachment.frozen)
            self._attachment = None
            if self._tower is not None:
                self._tower.restore()
        return self.language_model

    def memory_ffns(self) -> list[tuple[str, MemoryFFN]]:
        """The FFNs that have memory, with their names in the language model, in the order in which they run."""
        return memory_ffns(self.language_model)

    def adapter(self) -> Adapter:
        """The memory and the vision model, as files see them."""
        return Adapter(self._visual_memory(), self._tower)

    def _run(self, call: Callable[..., Any], inputs: dict[str, Any], images: Images, generation: bool = False) -> Any:
        """``call(**inputs)``, a forward or a generation, whose layers read the images."""
        if self._is_disabled():
            return call(**inputs)
        memory, index, token = self._read(inputs, images)
        if index is not None:  # generate() repeats it for beams, and makes one where there is none yet
            inputs["memory_index"] = index
        inputs["visual_memory"] = memory
        try:
            if token is None:
                output = call(**inputs)
            else:
                start = PromptStart(self.memvp_config, self.language_model, token)
                output = (start.generate if generation else start.forward)(call, inputs)
        finally:
            memory.close()
        assert self._attachment is not None
        check_all_read(self.language_model, memory, len(self._attachment.layers))
        return output

    def _draft(self, model: Any, inputs: dict[str, Any], images: Images) -> DraftModel:
        """``model`` as assisted decoding calls it, which reads its own memory of the images, or none."""
        if not isinstance(model, MemVPModel):
            return DraftModel(model)
        if model._is_disabled() or self._is_disabled():
            return DraftModel(model.language_model)
        if images.visual_core is not None:
            raise ValueError(
                "visual_core: wanted image_features or pixel_values beside an assistant_model that is a MemVPModel, whose "
                "cores are others; or pass its language_model, which reads no image"
            )
        memory, index, token = model._read(inputs, images)
        if token is not None or self.memvp_config.class_token:
            raise ValueError("assistant_model: prompts that begin with a class token are not drafted for; leave it out")
        return DraftModel(model.language_model, visual_memory=memory, memory_index=index)

    def _read(self, inputs: dict[str, Any], images: Images) -> BatchMemory:
        """The memory of a batch."""
        if self._attachment is None:
            raise RuntimeError("this MemVPModel was unloaded; wrap its language_model again, or call that")
        refuse_cut_images(self, **images._asdict())
        options: dict[str, Any] = {"backend": self.backend, "recompute": self.recompute, "observer": self._observer()}
        if not self._drops():
            options["dropout"] = 0.0
        return self._source().read(inputs, images, layers=len(self._attachment.layers), **options)

    def _source(self) -> MemorySource:
        if self._tower is not None:
            self._tower.fetch_adapters()
        return MemorySource(self.memory, self._visual_memory(), self.vision_model, self.language_model)

    def _visual_memory(self) -> VisualMemory:
        memory = getattr(self.memory, "module", self.memory)  # data-parallel wrappers keep it there
        fetch(memory)
        return memory


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _with_tensors(model: MemVPModel, images: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images with tensors in place of lists."""
    return images if model._is_disabled() else tuple(model._source().tensors(Images(*images)))
