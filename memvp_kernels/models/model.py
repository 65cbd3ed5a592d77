"""`MemVPModel`: a Hugging Face language model whose FFNs hold an image as key-value memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.models import saving
from memvp_kernels.models.attach import Attachment, attach, detach, first_layer, hidden_dtype, memory_ffns
from memvp_kernels.models.attribution import MemoryAttribution, explain_memory
from memvp_kernels.models.checkpoint import CheckpointReport, load_official_checkpoint
from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.features import ImageFeatures, Pixels, encode_pixels, pad_features
from memvp_kernels.models.memory import Memory, Observer, VisualMemory
from memvp_kernels.models.parallel import own_slots, tensor_mesh
from memvp_kernels.models.projector import Projector
from memvp_kernels.models.site import MemoryFFN
from memvp_kernels.models.state import whole
from memvp_kernels.models.vision import ClipAdapter

__all__ = ["MemVPModel"]


class MemVPModel(nn.Module):
    """Memory-space visual prompting on a language model (Jie et al., ICML 2024, arXiv 2405.05615).

    Acts on this instance alone: its layers and FFNs are re-classed in place, parameter names and state_dict keys stay,
    and :meth:`unload` gives the model back. It is frozen; the projector and the positions are what trains (in float32,
    whatever the model's dtype). It starts in the language model's mode, train or eval. A text-only sample of an
    untrained MemVPModel gets the language model's own output, up to rounding.

    An image is computed once per forward, or once per generation, into a core (M, r); every layer reads that core
    through a basis (r, d) that all images share.

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
        TypeError: ``config`` is not a MemVPConfig.
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
        attachment = attach(language_model, config)
        self._attachment: Attachment | None = attachment
        self.language_model: Any = language_model
        self.vision_model = _frozen(vision_model)
        self.memvp_config = config
        self.backend = backend
        self.recompute = recompute
        self._observer: Observer | None = None
        self.memory = VisualMemory(
            config,
            width=attachment.width,
            layers=len(attachment.layers),
            dtype=torch.promote_types(hidden_dtype(language_model), torch.float32),
            device=attachment.device,
        )
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
    def config(self) -> Any:
        """The language model's configuration, which is what training loops ask a model for."""
        return self.language_model.config

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
                tensors (several images, concatenated), or None (no image); or None: no images.
            pixel_values: (B, 3, H, W), or a list with one entry per sample: (3, H, W), (k, 3, H, W) or None.
            visual_core: (B, M, r) from :meth:`encode_images`, instead of features or pixels.
            visual_index: (B,) int64, which image each sample reads; then there may be any number of images. Default:
                image i belongs to sample i.
            **inputs: whatever else the language model takes.

        Returns:
            What the language model returns.

        Raises:
            TypeError, ValueError: images that do not fit the adapter or the batch.
            RuntimeError: reentrant activation checkpointing, which cannot share the memory between layers.
        """
        self._refuse_reentrant_checkpointing()
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        inputs.update({name: tensor for name, tensor in given.items() if tensor is not None})
        memory = self._memory(_samples(inputs), image_features, pixel_values, visual_core, visual_index)
        index = None if visual_index is None else visual_index.to(memory.core.device)
        return self.language_model(**inputs, visual_memory=memory, memory_index=index)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *,
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
            **kwargs: generate()'s own.

        Returns:
            What generate() returns.

        Raises:
            RuntimeError: in training mode with activation checkpointing on.
        """
        if any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.language_model.modules()):
            raise RuntimeError(
                "generate(): activation checkpointing withholds the cache from layers in training mode, and the tokens come "
                "out wrong; call eval() first"
            )
        if inputs is not None:
            kwargs["inputs"] = inputs
        samples = _samples(kwargs)
        memory = self._memory(samples, image_features, pixel_values, visual_core, visual_index)
        index = (
            torch.arange(samples) if visual_index is None else visual_index
        )  # a tensor: generate() repeats those for beams
        return self.language_model.generate(**kwargs, visual_memory=memory, memory_index=index.to(memory.core.device))

    def encode_images(
        self, image_features: ImageFeatures | None = None, *, pixel_values: Pixels | None = None
    ) -> Tensor:
        """The cores of images, to keep and to pass as ``visual_core=`` (a conversation, a cache, several questions).

        Args:
            image_features, pixel_values: as in :meth:`forward`; at least one.

        Returns:
            (B, M, r), in the projector's dtype, with a graph where gradients are on.

        Raises:
            ValueError: no images.
        """
        if image_features is None and pixel_values is None:
            raise ValueError("encode_images: wanted image_features or pixel_values, got neither")
        # through the module's call, which is where sharding gathers its parameters
        return self.memory(*self._features(0, image_features, pixel_values)).core

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Turn on the language model's activation checkpointing; ``options`` are its own (``every_n_layers``).

        Raises:
            ValueError: ``use_reentrant=True``.
        """
        wanted = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if wanted["use_reentrant"]:
            raise ValueError(_REENTRANT)
        if hasattr(self.language_model, "activation_checkpointing_enable"):
            self.language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=wanted, **options)
        else:  # older transformers know the older name only
            self.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=wanted, **options)

    def activation_checkpointing_disable(self) -> None:
        """Turn it off."""
        if hasattr(self.language_model, "activation_checkpointing_disable"):
            self.language_model.activation_checkpointing_disable()
        else:
            self.language_model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's own tensors by name, as they are: sharding leaves this rank a part of each."""
        tensors = dict(self._visual_memory().state_dict())
        if self.vision_model is not None:
            tensors |= {
                f"vision_model.{n}": p.detach() for n, p in self.vision_model.named_parameters() if p.requires_grad
            }
        return tensors

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What :meth:`save_pretrained` writes: the memory, and the vision model's trainable parameters.

        In full: where they are sharded, every rank must call this.
        """
        return {name: whole(tensor) for name, tensor in self.adapter_tensors().items()}

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`adapter_state_dict`.

        Raises:
            ValueError: a key too many or too few, or another shape; every one is named, and nothing is loaded.
        """
        saving.load_into(self, state)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter alone: ``memvp_config.json`` and ``memvp_model.safetensors``.

        Of several processes the first writes; where the adapter is sharded, every one must call this.
        """
        saving.save(folder, self)

    @classmethod
    def from_pretrained(
        cls, language_model: nn.Module, folder: str | Path, vision_model: nn.Module | None = None, **options: Any
    ) -> MemVPModel:
        """Wrap ``language_model`` with an adapter that :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: an adapter for another size; the language model is given back as it was.
        """
        config, state, settings = saving.load(folder)
        model = cls(language_model, config, vision_model, **options)
        try:
            saving.load_into(model, state, settings)
        except Exception:
            model.unload()
            raise
        return model

    def load_official_checkpoint(self, path: str | Path, *, vision_adapters: bool = True) -> CheckpointReport:
        """Load one of the official repository's ``.pth`` files; see :func:`~.checkpoint.load_official_checkpoint`."""
        return load_official_checkpoint(self, path, vision_adapters=vision_adapters)

    def unload(self) -> nn.Module:
        """Give the language model back as it was: same modules, classes, state_dict keys, trainable flags and outputs."""
        if self._attachment is not None:
            detach(self.language_model, self._attachment.frozen)
            self._attachment = None
        return self.language_model

    def memory_ffns(self) -> list[tuple[str, MemoryFFN]]:
        """The FFNs that have memory, with their names in the language model, in the order in which they run."""
        return memory_ffns(self.language_model)

    def explain_memory(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> MemoryAttribution:
        """How much of each FFN's output is the memory's, and which slots it came from.

        See :func:`~.attribution.explain_memory`; the result prints as a table and plots over the image's patches.
        """
        return explain_memory(self, input_ids, attention_mask, **inputs)

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Within it, ``observer(layer, x, y)`` is called by every FFN with memory: its position among those, in and out."""
        outer, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = outer

    def _visual_memory(self) -> VisualMemory:
        return getattr(self.memory, "module", self.memory)  # data-parallel wrappers keep it there

    def _features(
        self, samples: int, image_features: ImageFeatures | None, pixel_values: Pixels | None
    ) -> tuple[Tensor, Tensor]:
        if pixel_values is not None:
            if self.vision_model is None:
                raise ValueError(
                    "pixel_values: wanted a MemVPModel with vision_model=, got one without; pass image_features"
                )
            image_features = encode_pixels(self.vision_model, pixel_values)
        features, valid = pad_features(
            image_features,
            samples=samples,
            vision_dim=self.memvp_config.vision_dim,
            num_slots=self.memvp_config.num_slots,
            dtype=self.projector.fc1.weight.dtype,
            device=self.device,
        )
        shown = isinstance(image_features, Tensor) or any(entry is not None for entry in image_features or ())
        if self.vision_model is not None and not shown and torch.is_grad_enabled():
            # no image in the whole batch: the vision model's adapters get zeros, not None, like the projector
            for parameter in self.vision_model.parameters():
                if parameter.requires_grad:
                    features = features + 0.0 * parameter.sum().to(features)
        return features, valid

    def _memory(
        self,
        samples: int,
        image_features: ImageFeatures | None,
        pixel_values: Pixels | None,
        visual_core: Tensor | None,
        visual_index: Tensor | None,
    ) -> Memory:
        if self._attachment is None:
            raise RuntimeError("this MemVPModel was unloaded; wrap its language_model again, or call that")
        given = {"image_features": image_features, "pixel_values": pixel_values, "visual_core": visual_core}
        names = [name for name, images in given.items() if images is not None]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} were given; they are ways to say the same thing, pass one")
        if visual_core is not None:
            core = self._checked_core(visual_core)
            images = core.shape[0]
        else:
            features, valid = self._features(samples, image_features, pixel_values)
            images = features.shape[0]
        if visual_index is not None:
            if visual_index.dim() != 1 or visual_index.shape[0] != samples or visual_index.is_floating_point():
                raise ValueError(
                    f"visual_index: wanted {samples} integers, one per sample, got {tuple(visual_index.shape)} "
                    f"{visual_index.dtype}"
                )
        elif images != samples:
            raise ValueError(
                f"{names[0]}: {images} images for {samples} samples; give one entry per sample (None for no image), or say "
                "with visual_index which image each sample reads"
            )
        memory: Memory = self.memory(core=core) if visual_core is not None else self.memory(features, valid)
        if not torch.is_grad_enabled():  # once here instead of in every layer; under grad the sums stay wide
            memory = memory.to(hidden_dtype(self.language_model))
        memory = memory._replace(backend=self.backend, recompute=self.recompute, observer=self._observer)
        mesh = tensor_mesh(self.language_model)
        # once, outside the layers: what crosses the network backward then does so once per step
        return memory if mesh is None else memory._replace(own=own_slots(memory, mesh))

    def _checked_core(self, core: Tensor) -> Tensor:
        wanted = (self.memvp_config.num_slots, self.projector.rank)
        if not isinstance(core, Tensor) or core.dim() != 3 or tuple(core.shape[1:]) != wanted:
            got = tuple(core.shape) if isinstance(core, Tensor) else type(core).__name__
            raise ValueError(f"visual_core: wanted (B, {wanted[0]}, {wanted[1]}) from encode_images, got {got}")
        return core.to(self.device, self.projector.fc2.weight.dtype)

    def _refuse_reentrant_checkpointing(self) -> None:
        if not (self.training and torch.is_grad_enabled()):
            return
        layer = first_layer(self.language_model)
        keywords = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(layer, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            raise RuntimeError(_REENTRANT)


_REENTRANT = (
    "activation checkpointing with use_reentrant=True walks the projector's graph once per layer and fails in the second; "
    'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
)


def _frozen(vision_model: nn.Module | None) -> nn.Module | None:
    """The vision model frozen but for adapters that it has already."""
    if vision_model is not None:
        vision_model.requires_grad_(False)
        for module in vision_model.modules():
            if isinstance(module, ClipAdapter):
                module.requires_grad_(True)
    return vision_model


def _samples(inputs: dict[str, Any]) -> int:
    """B, from whichever of the language model's inputs is there; a generation from nothing has one sample."""
    for name in ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "labels", "attention_mask"):
        tensor = inputs.get(name)
        if tensor is not None:
            return int(tensor.shape[0])
    return 1
