"""ADEM-VL's prompt (Hao et al., arXiv 2410.17779), which begins with its image's class token.

Behind a prompt's BOS, or first where it has none, come the ids of ``image_prefix`` and the class token's embedding; without an image,
those of ``text_prefix``. What a caller passes and gets back has the columns of the prompt as given: column i of the logits predicts
token i + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.memory.visual_memory import ClassToken
from memvp_kernels.models.offloading import execution_device
from memvp_kernels.models.parallel.fsdp import gather
from memvp_kernels.models.patching.attach import transformers_model

__all__ = ["PromptStart", "refuse_unsuited", "width_of"]

_PER_TOKEN = ("logits", "last_hidden_state")  # of an output
_UNSUITED = {
    "assistant_model": "a draft model's prompt begins differently",
    "prompt_lookup_num_tokens": "candidates are looked up in the prompt's ids, where the class token has none",
    "prefill_chunk_size": "a prompt in chunks is read from its ids, where the class token has none",
}


def width_of(config: MemVPConfig) -> int:
    """K, the columns by which every prompt of a batch grows, with an image or without."""
    return max(len(config.image_prefix) + 1, len(config.text_prefix))


def refuse_unsuited(language_model: nn.Module) -> None:
    """Refuse a language model whose prompt has no such beginning.

    Raises:
        ValueError: an encoder-decoder, or PEFT's prompt learning, which begins the prompt itself.
    """
    way_out = "; pass class_token=False, which leaves the pooled memory in the FFNs"
    if transformers_model(language_model).config.is_encoder_decoder:  # type: ignore[union-attr]
        raise ValueError(
            f"class_token: wanted a decoder-only model, whose prompt it begins, got the encoder-decoder "
            f"{type(transformers_model(language_model)).__name__}{way_out}"
        )
    if getattr(getattr(language_model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"class_token: PEFT's prompt learning begins the prompt with tokens of its own{way_out}")


class PromptStart:
    """The beginning of one batch's prompts.

    Args:
        config: of the adapter.
        language_model: that reads the prompts.
        token: the class token of each sample.
    """

    def __init__(self, config: MemVPConfig, language_model: Any, token: ClassToken) -> None:
        self._config = config
        self._language_model = language_model
        self._token = token
        self._width = width_of(config)

    def forward(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """``call(**inputs)``, a forward, whose output has the columns of ``inputs``.

        Hidden states lose the additional columns like the logits, attentions keep them. The cache holds them: a later call that
        passes it gets a longer mask and later positions.
        """
        past = inputs.get("past_key_values")
        seen = int(past.get_seq_length()) if past is not None else 0
        inputs = dict(inputs)
        if seen:
            self._continue(inputs, seen)
            return call(**inputs)
        wanted = inputs.pop("return_dict", None)
        length = self._begin(inputs)
        output = call(**inputs, return_dict=True)
        keep = inputs.get("logits_to_keep", 0)
        for name in _PER_TOKEN:
            t = output.get(name)
            if t is not None and t.shape[1] == length + self._width and isinstance(keep, int):
                output[name] = t[:, self._width :]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(t[:, self._width :] for t in output["hidden_states"])
        return output if (self._settings.return_dict if wanted is None else wanted) else output.to_tuple()

    def generate(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """``call(**inputs)``, a generation, whose sequences begin with the prompt as given.

        Raises:
            ValueError: a way to generate that reads the prompt from its ids, where the class token has none.
        """
        inputs = dict(inputs)
        configs = (inputs.get("generation_config"), transformers_model(self._language_model).generation_config)

        def setting(name: str) -> Any:
            values = (inputs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        for name, reason in _UNSUITED.items():
            if setting(name) is not None:
                raise ValueError(f"{name}: {reason}; leave it out")
        prompt = inputs.pop("inputs", None)
        prompt = inputs.get("input_ids") if prompt is None else prompt
        if inputs.get("attention_mask") is None and prompt is not None:
            inputs["attention_mask"] = _mask_of(prompt, setting("pad_token_id"), setting("eos_token_id"))
        inputs["input_ids"] = prompt
        length = self._begin(inputs, keep_ids=True)
        for name in ("max_length", "min_length"):
            if setting(name):
                inputs[name] = setting(name) + self._width
        output = call(**inputs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        assert prompt is not None
        given = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0).to(sequences.device)
        sequences = torch.cat([given, sequences[:, length + self._width :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output["sequences"] = sequences
        return output

    @property
    def _settings(self) -> Any:
        """The language model's configuration."""
        return transformers_model(self._language_model).config

    def _inserted(self, device: torch.device) -> Tensor:
        """(B, 1), how many columns of each row are new; the others of K are padding on its left."""
        lengths = len(self._config.image_prefix) + 1, len(self._config.text_prefix)
        return torch.where(self._token.present.to(device), *lengths).unsqueeze(1)

    def _begin(self, inputs: dict[str, Any], *, keep_ids: bool = False) -> int:
        """Put the beginning into ``inputs``; how many columns they had."""
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None or inputs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds: wanted input_ids alone, since the class token goes behind the prompt's BOS; embed nothing, or "
                "build the model with class_token=False"
            )
        mask: Tensor | None = inputs.get("attention_mask")
        _check_mask(mask, ids.shape[1])
        inserted = self._inserted(ids.device)
        first = _first(mask, ids)
        begins = ids.gather(1, first)
        bos = self._settings.get_text_config().bos_token_id
        behind = torch.zeros_like(first) if bos is None else (begins == bos).long()
        columns = _Columns(first, behind, inserted, self._width, ids.shape[1])

        present = self._token.present.to(ids.device).unsqueeze(1)
        block = torch.where(present, *self._blocks(begins))
        ids = columns.of(ids, block)
        embedding = self._language_model.get_input_embeddings()
        gather(self._language_model, embedding)
        embeds: Tensor = embedding(ids.to(execution_device(embedding)))  # generate() takes ids that are on the CPU
        is_token = columns.new & (columns.place == self._width - 1) & present
        token = self._token.embedding.to(embeds.device, embeds.dtype).unsqueeze(1)
        inputs["inputs_embeds"] = torch.where(is_token.to(embeds.device).unsqueeze(-1), token, embeds)
        inputs["input_ids"] = ids if keep_ids else None
        inputs["attention_mask"] = columns.mask(mask)
        if not keep_ids or inputs.get("position_ids") is not None:  # generate() counts the mask's ones
            inputs["position_ids"] = columns.positions(inputs.get("position_ids"), first)
        if inputs.get("labels") is not None:
            labels = inputs["labels"]
            labels = labels.scatter(1, first.to(labels.device), -100)  # nothing predicts a first token
            labels = columns.of(labels, torch.full_like(labels[:, :1], -100).expand(-1, self._width))
            inputs["labels"] = labels.masked_fill(columns.padding.to(labels.device), -100)
        keep = inputs.get("logits_to_keep")
        if isinstance(keep, Tensor):
            inputs["logits_to_keep"] = keep + self._width
        elif keep:
            inputs["logits_to_keep"] = min(keep, columns.length)
        return columns.length

    def _blocks(self, begins: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K): the new ids of a row with an image and without, at its right; its first token's id for what has none.

        Written one by one: a tensor made of a list could not be captured in a CUDA graph.
        """
        with_image, without = (begins.repeat(1, self._width) for _ in range(2))
        for block, prefix, end in ((with_image, self._config.image_prefix, 1), (without, self._config.text_prefix, 0)):
            for place, token in enumerate(prefix, start=self._width - len(prefix) - end):
                block[:, place] = token
        return with_image, without

    def _continue(self, inputs: dict[str, Any], seen: int) -> None:
        """The mask and the positions of a call whose cache has the beginning."""
        given = next(t for t in (inputs.get("input_ids"), inputs.get("inputs_embeds")) if t is not None)
        mask: Tensor | None = inputs.get("attention_mask")
        whole = seen - self._width + given.shape[1]
        _check_mask(mask, whole)
        inserted = self._inserted(given.device)
        first = _first(mask, given)
        columns = _Columns(first, torch.zeros_like(first), inserted, self._width, whole)
        inputs["attention_mask"] = columns.mask(mask)
        positions = inputs.get("position_ids")
        if positions is None:
            positions = columns.positions(None, first)[:, -given.shape[1] :]
        else:
            positions = positions + inserted
        inputs["position_ids"] = positions


class _Columns:
    """Where the columns of rows with a beginning come from.

    Args:
        first: (B, 1), the first column that is no padding.
        behind: (B, 1), 1 where it stays in front of the beginning.
        inserted: (B, 1), how many columns are new.
        width: K.
        length: T, columns as given.

    Attributes:
        padding: (B, K + T) bool, padding on the left, old and new.
        new: (B, K + T) bool.
        place: (B, K + T), of a new column within K, at their right.
    """

    def __init__(self, first: Tensor, behind: Tensor, inserted: Tensor, width: int, length: int) -> None:
        self.length = length
        column = torch.arange(width + length, device=first.device).unsqueeze(0)
        place, gap = column - first - behind, width - inserted
        self.padding = column < first + gap
        self.new = (place >= gap) & (place < width)
        self.place = place.clamp(0, width - 1)
        self._gap, self._inserted, self._column = gap, inserted, column
        self._after = place >= width
        self._source = torch.where(self._after, column - width, column - gap).clamp(0, length - 1)

    def of(self, t: Tensor, new: Tensor) -> Tensor:
        """(B, K + T): the columns of ``t`` (B, T), and of ``new`` (B, K); padding is whatever it is."""
        place = self.place.to(t.device)
        return torch.where(self.new.to(t.device), new.gather(1, place), t.gather(1, self._source.to(t.device)))

    def mask(self, mask: Tensor | None) -> Tensor:
        """The attention mask."""
        if mask is None:
            return (~self.padding).long()
        longer = self.of(mask, torch.ones_like(mask[:, :1]).expand(-1, self.place.shape[1] - self.length))
        return longer.masked_fill(self.padding.to(mask.device), 0)

    def positions(self, positions: Tensor | None, first: Tensor) -> Tensor:
        """The position ids; where none are given they count a row's columns, as transformers does."""
        if positions is None:
            return (self._column - self._gap).clamp_min(0)
        positions = positions.expand(first.shape[0], -1)
        before = positions.gather(1, first) + self._column - first - self._gap
        return torch.where(self._after, positions.gather(1, self._source) + self._inserted, before).clamp_min(0)


def _first(mask: Tensor | None, given: Tensor) -> Tensor:
    """(B, 1), the first column that is no padding."""
    if mask is None:
        return torch.zeros(given.shape[0], 1, dtype=torch.long, device=given.device)
    return mask.ne(0).int().argmax(dim=1, keepdim=True).to(given.device)


def _check_mask(mask: Tensor | None, length: int) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] != length):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: wanted (B, {length}), which the class token is put into, got {got}; pass the tokenizer's"
        )


def _mask_of(ids: Tensor, pad: Any, eos: Any) -> Tensor | None:
    """As generate() infers it: from the padding's ids, unless a sequence may end with such a one."""
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return None if pad is None or pad in ends else ids.ne(pad).long()
