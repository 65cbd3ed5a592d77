"""What tools around a model ask of it, answered as its language model would: by an explicit list, and no further.

What would run the language model without the image (its encoder, its layers) is not on the list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memvp_kernels.models.inputs import Images
from memvp_kernels.models.patching.attach import transformers_model

__all__ = ["FLAGS", "LanguageModelInterface", "loss_per_item"]

#: Of a base that FSDP2 has sharded, copied to the model: Dynamo looks for them without asking a descriptor, and would take one for a yes.
FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


class _Delegated:
    """An attribute or a method of the language model, under the same name; AttributeError where that has none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self if model is None else getattr(model.language_model, self.name)


class LanguageModelInterface:
    """The part of a language model's interface that needs no image."""

    language_model: Any

    # generation
    can_generate = _Delegated()
    compute_transition_scores = _Delegated()
    prepare_decoder_input_ids_from_labels = _Delegated()
    _supports_logits_to_keep = _Delegated()
    # training
    accepts_loss_kwargs = _Delegated()
    loss_type = _Delegated()
    warnings_issued = _Delegated()
    add_model_tags = _Delegated()
    model_tags = _Delegated()
    enable_input_require_grads = _Delegated()
    disable_input_require_grads = _Delegated()
    supports_gradient_checkpointing = _Delegated()
    is_gradient_checkpointing = _Delegated()
    is_activation_checkpointing = _Delegated()
    # embeddings
    get_input_embeddings = _Delegated()
    set_input_embeddings = _Delegated()
    get_output_embeddings = _Delegated()
    set_output_embeddings = _Delegated()
    resize_token_embeddings = _Delegated()
    tie_weights = _Delegated()
    # how it was loaded
    dtype = _Delegated()
    name_or_path = _Delegated()
    main_input_name = _Delegated()
    input_modalities = _Delegated()
    output_modalities = _Delegated()
    hf_device_map = _Delegated()
    hf_quantizer = _Delegated()
    is_quantized = _Delegated()
    quantization_method = _Delegated()
    is_loaded_in_4bit = _Delegated()
    is_loaded_in_8bit = _Delegated()
    set_attn_implementation = _Delegated()
    _no_split_modules = _Delegated()
    _skip_keys_device_placement = _Delegated()
    _keys_to_ignore_on_save = _Delegated()
    # sharded by from_pretrained(distributed_config=...): Trainer then averages the memory's gradients itself, as LoRA's
    is_distributed_loading_by_transformers = _Delegated()
    set_requires_gradient_sync = _Delegated()
    set_requires_all_reduce = _Delegated()
    tp_size = _Delegated()
    _tp_size = _Delegated()

    @property
    def config(self) -> Any:
        """The language model's configuration, which is what training loops ask a model for."""
        return self.language_model.config

    @property
    def generation_config(self) -> Any:
        """The language model's; setting it sets the language model's."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        transformers_model(self.language_model).generation_config = value

    @property
    def base_model(self) -> Callable[..., Any]:
        """The language model without its head, as a function that takes what :meth:`MemVPModel.forward` takes, images too.

        Raises:
            NotImplementedError: below PEFT's prompt tuning, whose tokens PEFT adds outside.
        """
        if getattr(getattr(self.language_model, "active_peft_config", None), "is_prompt_learning", False):
            raise NotImplementedError("base_model: PEFT adds its prompt's tokens outside it; call the model itself")
        backbone = transformers_model(self.language_model).base_model

        def run(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
            self._refuse_reentrant_checkpointing()  # type: ignore[attr-defined]
            images = Images(*(inputs.pop(name, None) for name in Images._fields))
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            inputs |= {name: tensor for name, tensor in given.items() if tensor is not None}
            return self._run(backbone, inputs, images)  # type: ignore[attr-defined]

        return run

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As transformers counts: the language model's, the memory's and the vision model's."""
        return PreTrainedModel.num_parameters(self, only_trainable, exclude_embeddings)  # type: ignore[arg-type]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all parameters and buffers, as transformers counts them."""
        return int(PreTrainedModel.get_memory_footprint(self, return_buffers))  # type: ignore[arg-type,no-untyped-call]

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: it has no image per request.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "generate_batch: continuous batching packs requests into one row and has no image per request; "
            "use generate(), or the vLLM plug-in for serving"
        )

    def _get_name(self) -> str:
        """The language model's: Trainer's label smoothing shifts labels for the class names of causal models."""
        return type(transformers_model(self.language_model)).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)


def loss_per_item(output: Any, labels: Tensor, items: Tensor | int) -> Any:
    """``output``, an encoder-decoder's, its loss the sum over the labels divided by ``items``.

    Trainer counts the labels of all the batches that it accumulates; T5 and BART ignore the number and return a mean.
    """
    count = labels.ne(-100).sum()
    mean = output[0]
    loss = torch.where(count > 0, mean * (count / torch.as_tensor(items, device=mean.device)), 0.0)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output
