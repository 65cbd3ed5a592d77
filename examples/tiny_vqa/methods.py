"""Ways to show an image to a frozen language model: slots of its FFNs' memory, and tokens of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.memory.projector import Projector
from tiny_vqa.text import Batch, Vocabulary

__all__ = ["InMemory", "InPrompt", "Method"]

NEW_TOKENS = 2  # an answer and the end token


class Method(nn.Module):
    """A frozen language model with something trainable that shows it images.

    Attributes:
        name: for tables.
        places: how many tokens of the prompt stand for the image.
    """

    name: str
    places: int

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        """Mean cross-entropy of the answers."""
        raise NotImplementedError

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        """(B, NEW_TOKENS) token ids, greedily; features None: without the image."""
        raise NotImplementedError

    def calibrate(self, features: Tensor, questions: Batch, share: float) -> str:
        """Choose by one batch how strongly the image comes in before anything is trained; what was found, in words."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer may change."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class InMemory(Method):
    """The image's features become slots of every FFN; one word of the prompt says where the image is.

    Where the configuration wants a class token (ADEM-VL), it is the mean of the features.
    """

    places = 1

    def __init__(self, name: str, language_model: nn.Module, config: MemVPConfig) -> None:
        super().__init__()
        self.name = name
        self.model = MemVPModel(language_model, config)

    def calibrate(self, features: Tensor, questions: Batch, share: float) -> str:
        """Let the memory start at a share of each FFN's output; the shares before and after, as a table."""
        ids, mask = questions.input_ids, questions.attention_mask
        return str(self.model.calibrate(ids, mask, image_features=self.shown(features), share=share))

    def loss(self, features: Tensor, questions: Batch) -> Tensor:
        loss: Tensor = self.model(**questions._asdict(), image_features=self.shown(features)).loss
        return loss

    def answer(self, features: Tensor | None, questions: Batch) -> Tensor:
        ids, mask = questions.input_ids, questions.attention_mask
        shown = None if features is None else self.shown(features)
        out: Tensor = self.model.generate(
            input_ids=ids, attention_mask=mask, image_features=shown, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out[:, ids.shape[1] :]

    def shown(self, features: Tensor) -> Tensor:
        if not self.model.memvp_config.class_token:
            return features
        return torch.cat([features.mean(dim=1, keepdim=True), features], dim=1)


class InPrompt(Method):
    """The usual way: the same projector makes tokens of the features, which stand in the prompt; each has a position.

    Attributes:
        scale: multiplies the tokens.
    """

    name = "tokens in the prompt"

    def __init__(
        self,
        language_model: PreTrainedModel,
        vocabulary: Vocabulary,
        *,
        tokens: int,
        vision_dim: int,
        projector_dim: int = 64,
    ) -> None:
        super().__init__()
        self.places = tokens
        self.language_model = language_model.requires_grad_(False)
        self._image = vocabulary.image
        width = language_model.config.hidden_size
        self.projector = Projector(vision_dim, projector_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.scale = 1.0

    @torch.no_grad()
    def calibrate(self, features: Tensor, questions: Batch, share: float) -> str:
        """Let a visual token start at a share of the size of a word's embedding."""
        words = self.language_model.get_input_embeddings().weight
        tokens = self.projector(features) + self.position
        before = (tokens.square().mean() / words.square().mean()).sqrt().item()
        self.scale = share / before
        return f"size of a visual token, in words': {before:.2f}, now {share:.2f}"

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
        return embeds.masked_scatter(places, self.scale * (self.projector(features) + self.position))
