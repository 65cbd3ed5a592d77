"""transformers' Trainer with checkpoints that hold what trains, not the frozen language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from memvp_kernels.models.model import MemVPModel

__all__ = ["MemVPTrainer"]


class MemVPTrainer(Trainer):
    """A Trainer for a :class:`~memvp_kernels.MemVPModel`: saving, resuming and the best model, in kilobytes instead of gigabytes.

    A plain Trainer trains the same, but writes the whole language model at every save, and fails there where that ties
    its embeddings. Every checkpoint is also a folder for ``MemVPModel.from_pretrained``.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model: MemVPModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        whole = model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor for name, tensor in whole.items() if name in trainable})
        model.save_pretrained(output_dir or str(self.args.output_dir))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What is frozen is missing from a checkpoint; anything else that does not fit is an error."""
        model: Any = self.model
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = sorted(trainable & set(load_result.missing_keys))
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit this model: missing {missing}, unexpected {load_result.unexpected_keys}"
            )
