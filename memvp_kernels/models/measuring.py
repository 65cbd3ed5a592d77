"""The part of a MemVPModel that says how much its memory adds, and sets how much it does at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memvp_kernels.models.attribution import MemoryAttribution, MemoryRecorder
from memvp_kernels.models.calibration import Calibration, calibrate
from memvp_kernels.models.relatives.adem_vl import width_of

__all__ = ["Measuring"]


class Measuring:
    """What a model with a memory measures of it."""

    @torch.no_grad()
    def explain_memory(
        self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> MemoryAttribution:
        """Run one forward and measure, per layer and token, what the memory adds to the FFN's output.

        Dropout is off meanwhile. The result prints as a table and plots over the image's patches.

        Args:
            input_ids: (B, T), the prompt, or prompt and answer.
            attention_mask: (B, T); its zeros are left out of every average.
            **inputs: the images, and whatever else the model's forward takes.

        Returns:
            The measurements, on the CPU in float32.
        """
        recorder = MemoryRecorder(
            self.memory_ffns(),
            self.projector.fc2.in_features,
            pooled_grids=self.memvp_config.pooled_grids,
            encoder_mask=attention_mask,
            decoder_mask=inputs.get("decoder_attention_mask"),
            encoder_decoder=self.config.is_encoder_decoder,
        )
        begun = width_of(self.memvp_config) if self.memvp_config.class_token else 0  # columns that the prompt grew by
        with self.observing(lambda layer, x, y: recorder(layer, x[:, begun:], y[:, begun:])), self._without_dropout():
            self(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        return recorder.result()

    def calibrate(
        self: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        share: float = 0.02,
        key_ratio: float = 1.0,
        **inputs: Any,
    ) -> Calibration:
        """Before training, set λ, and s of each layer, so that the memory starts at a wanted share of every FFN's output.

        For models and features of other sizes than the paper's, where its λ = 0.01 and s = 0.1 may be a share of 0.0 %.
        Looks at one batch, without labels, and measures as :meth:`explain_memory` does. The new constants are those of
        ``memvp_config``, and so are saved and loaded with the adapter.

        Args:
            input_ids, attention_mask: (B, T), prompts as in training.
            share: wanted, in (0, 1), as a mean over the batch's tokens.
            key_ratio: how large the image is in the memory's keys, against their positions p^k.
            **inputs: the images, and whatever else the model's forward takes.

        Returns:
            The shares before and after, and the constants; it prints as a table.

        Raises:
            ValueError: a share or ratio out of range, or a batch without an image; nothing is changed then.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        return calibrate(self, batch, share=share, key_ratio=key_ratio)
