"""Two ways to show an image to a frozen language model: slots of its FFNs' memory, and tokens of its prompt."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from digit_questions.questions import IMAGE, Batch, Vocabulary
from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.memory.projector import Projector

__all__ = ["Contestant", "InMemory", "InPrompt"]

PROJECTOR_DIM = 64
FREE_SLOTS = 7
NEW_TOKENS = 2  # an answer and the end token


class Contestant(Protocol):
    """What a way of showing images has to do.

    Attributes:
        name: for tables.
        shown: what stands for the image in the prompt's text.
    """

    name: str
    shown: str

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        """Mean cross-entropy of the answers."""

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        """(B, NEW_TOKENS) token ids, greedily; features None: without the image."""

    def trained(self) -> list[nn.Parameter]:
        """What the optimiser may change."""


class InMemory:
    """MemVP: the image's features become slots of every FFN; the prompt holds one word that says where the image is."""

    name = "MemVP"
    shown = IMAGE

    def __init__(self, language_model: LlamaForCausalLM, *, tokens: int, vision_dim: int) -> None:
        config = MemVPConfig(
            vision_dim=vision_dim,
            projector_dim=PROJECTOR_DIM,
            num_slots=tokens + FREE_SLOTS,
            feature_scale=1.0,  # the paper's 0.01 and 0.1 suit LLaMA-7B's CLIP features and a hidden size of 4,096
            memory_scale=1.0,
            dropout=0.0,
            shared_positions=False,
        )
        self.model = MemVPModel(language_model, config)

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        """See :class:`Contestant`."""
        loss: Tensor = self.model(**questions._asdict(), image_features=features).loss
        return loss

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        """See :class:`Contestant`."""
        ids, mask = questions.input_ids, questions.attention_mask
        out: Tensor = self.model.generate(
            input_ids=ids, attention_mask=mask, image_features=features, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out[:, ids.shape[1] :]

    def trained(self) -> list[nn.Parameter]:
        """See :class:`Contestant`."""
        return list(self.model.memory.parameters())


class InPrompt:
    """The usual way: the same projector makes tokens of the features, which stand in the prompt; each has a position."""

    name = "tokens in the prompt"

    def __init__(
        self, language_model: LlamaForCausalLM, vocabulary: Vocabulary, *, tokens: int, vision_dim: int
    ) -> None:
        self.language_model = language_model.requires_grad_(False)
        self.shown = " ".join([IMAGE] * tokens)
        self._image = vocabulary.image
        width = language_model.config.hidden_size
        self.projector = Projector(vision_dim, PROJECTOR_DIM, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        """See :class:`Contestant`."""
        embeds = self._embed(features, questions.input_ids)
        loss: Tensor = self.language_model(
            inputs_embeds=embeds, attention_mask=questions.attention_mask, labels=questions.labels
        ).loss
        return loss

    @torch.no_grad()
    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        """See :class:`Contestant`."""
        embeds = self._embed(features, questions.input_ids)
        out: Tensor = self.language_model.generate(
            inputs_embeds=embeds, attention_mask=questions.attention_mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out

    def trained(self) -> list[nn.Parameter]:
        """See :class:`Contestant`."""
        return [*self.projector.parameters(), self.position]

    def _embed(self, features: Tensor | None, ids: Tensor) -> Tensor:
        """(B, T, width): words, and in the image's places its tokens."""
        embeds: Tensor = self.language_model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        places = (ids == self._image).unsqueeze(-1)
        return embeds.masked_scatter(places, self.projector(features) + self.position)
