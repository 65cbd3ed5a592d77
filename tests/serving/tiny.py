"""Tiny random models of the families that vLLM serves, whose images change every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from memvp_kernels import MemVPConfig, MemVPModel

VOCABULARY = 512
SLOTS, VISION = 20, 24
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def model(
    family: str = "Llama", *, pictures: bool = False, sizes: dict[str, Any] | None = None, **config: Any
) -> MemVPModel:
    """A MemVPModel in evaluation mode, the same one for the same arguments.

    Args:
        family: one of FAMILIES.
        pictures: with a CLIP vision model of 16 patches.
        sizes: of the language model, where they are to differ.
        config: of the adapter, likewise.
    """
    torch.manual_seed(0)
    settings = {**_SIZES, **({"sliding_window": None} if family == "Mistral" else {}), **(sizes or {})}
    language_model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    for parameter in language_model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    vision = None
    if pictures:
        vision = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=VISION,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
            )
        )
        for parameter in vision.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    adapter = {"vision_dim": VISION, "projector_dim": 16, "num_slots": SLOTS, "feature_scale": 1.0, "memory_scale": 1.0}
    made = MemVPModel(language_model, MemVPConfig(**{**adapter, **config}), vision_model=vision).eval()
    for parameter in made.memory.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made


def images(count: int, seed: int = 1) -> list[Tensor]:
    """Features, of which every third has fewer rows than the rest."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(11 if i % 3 == 2 else SLOTS, VISION, generator=generator) for i in range(count)]


def answer(model: MemVPModel, prompt: list[int], tokens: int, **image: Any) -> list[int]:
    """Greedy tokens of one request by transformers."""
    ids = torch.tensor([prompt])
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, **image,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def save_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of words w0, w1, … with a chat template, written into `folder`."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "<s> {% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return fast
