"""Two ways to show an image to a frozen language model: slots of its FFNs' memory, and tokens of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from digit_questions.images import GRID, PATCH
from digit_questions.questions import IMAGE, Batch, Vocabulary
from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.memory.projector import Projector

__all__ = ["InMemory", "InPrompt", "Method"]

TOKENS, VISION_DIM, PROJECTOR_DIM = GRID**2, PATCH**2, 64
FREE_SLOTS = 7
NEW_TOKENS = 2  # an answer and the end token


class Method(nn.Module):
    """A frozen language model with something trainable that shows it images.

    Attributes:
        name: for tables.
        shown: what stands for the image in the prompt's text.
    """

    name: str
    shown: str

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        """Mean cross-entropy of the answers."""
        raise NotImplementedError

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        """(B, NEW_TOKENS) token ids, greedily; features None: without the image."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer may change."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class InMemory(Method):
    """MemVP: the image's features become slots of every FFN; one word of the prompt says where the image is."""

    name = "MemVP"
    shown = IMAGE

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        config = MemVPConfig(
            vision_dim=VISION_DIM,
            projector_dim=PROJECTOR_DIM,
            num_slots=TOKENS + FREE_SLOTS,
            feature_scale=1.0,  # the paper's 0.01 and 0.1 suit LLaMA-7B's CLIP features and a hidden size of 4,096
            memory_scale=1.0,
            dropout=0.0,
            shared_positions=False,
        )
        self.model = MemVPModel(language_model, config)

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        loss: Tensor = self.model(**questions._asdict(), image_features=features).loss
        return loss

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        ids, mask = questions.input_ids, questions.attention_mask
        out: Tensor = self.model.generate(
            input_ids=ids, attention_mask=mask, image_features=features, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out[:, ids.shape[1] :]


class InPrompt(Method):
    """The usual way: the same projector makes tokens of the features, which stand in the prompt; each has a position."""

    name = "tokens in the prompt"
    shown = " ".join([IMAGE] * TOKENS)

    def __init__(self, language_model: LlamaForCausalLM, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self._image = vocabulary.image
        width = language_model.config.hidden_size
        self.projector = Projector(VISION_DIM, PROJECTOR_DIM, width)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, width))

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        embeds, mask = self.embed(features, questions.input_ids), questions.attention_mask
        loss: Tensor = self.language_model(inputs_embeds=embeds, attention_mask=mask, labels=questions.labels).loss
        return loss

    @torch.no_grad()
    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        embeds, mask = self.embed(features, questions.input_ids), questions.attention_mask
        out: Tensor = self.language_model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out

    def embed(self, features: Tensor | None, ids: Tensor) -> Tensor:
        """(B, T, width): words, and in the image's places its tokens."""
        embeds: Tensor = self.language_model.get_input_embeddings()(ids)
        if features is None:
            return embeds
        places = (ids == self._image).unsqueeze(-1)
        return embeds.masked_scatter(places, self.projector(features) + self.position)
