"""transformers' Trainer with checkpoints that hold what trains, not the frozen language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from memvp_kernels.models.io import adapter as files
from memvp_kernels.models.io.state import full_tensor
from memvp_kernels.models.model import MemVPModel

__all__ = ["MemVPTrainer"]


class MemVPTrainer(Trainer):
    """A Trainer for a :class:`~memvp_kernels.MemVPModel`: saving, resuming and the best model, in kilobytes instead of gigabytes.

    A plain Trainer trains the same, but writes the whole language model at every save, and fails there where that ties
    its embeddings. Every checkpoint is also a folder for ``MemVPModel.from_pretrained``.

    A streamed dataset is read by every process, each keeping its share: accelerate's default, one process that reads and
    sends slices, cuts inside lists of images.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Streamed batches are dispatched by one process only where the arguments ask for that."""
        super().create_accelerator_and_postprocess()
        loading = self.accelerator.dataloader_config
        if loading.dispatch_batches is None:
            loading.dispatch_batches = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; with label smoothing, an encoder-decoder still reads the shifted labels that Trainer withholds."""
        base: Any = self.model
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
        if self.label_smoother is not None and "labels" in inputs and base.config.is_encoder_decoder and not given:
            inputs = {**inputs, "decoder_input_ids": base.prepare_decoder_input_ids_from_labels(inputs["labels"])}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Without ``state_dict`` every process must come here, with it (FSDP has gathered it) the writing one suffices."""
        model: MemVPModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        parameters = dict(model.named_parameters())
        trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if state_dict is None:
            kept = {name: p for name, p in parameters.items() if name in trainable or name.startswith("memory.")}
            state_dict = {name: full_tensor(parameter.detach()) for name, parameter in kept.items()}
        super()._save(output_dir, {name: tensor for name, tensor in state_dict.items() if name in trainable})
        if self.args.should_save:
            adapter = model.adapter()
            files.write(output_dir or str(self.args.output_dir), adapter, adapter.part_of(state_dict))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What is frozen is missing from a checkpoint; anything else that does not fit is an error."""
        model: Any = self.model
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = sorted(trainable & set(load_result.missing_keys))
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit this model: missing {missing}, unexpected {load_result.unexpected_keys}"
            )
