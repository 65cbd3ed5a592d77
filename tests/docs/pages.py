"""The Python blocks of the README and of docs/, and a folder with tiny models under the names that they load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.examples.tiny_scienceqa import clip_config, llama_config, tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The page's blocks, each behind as many empty lines as are above it, so that a traceback names the page's line."""
    text = page.read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in BLOCK.finditer(text)]


def write_models(folder: Path) -> None:
    """`your-llama`, CLIP and LLaVA under their names on the Hub, and `photo.png`."""
    torch.manual_seed(0)
    words = tokenizer()
    words.pad_token = words.unk_token
    words.model_input_names = ["input_ids", "attention_mask"]
    words.save_pretrained(folder / "your-llama")
    shape = llama_config(words, pad_token_id=words.pad_token_id)
    LlamaForCausalLM(shape).save_pretrained(folder / "your-llama")
    clip = clip_config()
    name = "openai/clip-vit-large-patch14"
    CLIPVisionModel(clip).save_pretrained(folder / name)
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder / name)
    _write_llava(folder / "llava-hf/llava-1.5-7b-hf", shape, clip, words, CLIPImageProcessor(size=size, crop_size=size))
    Image.new("RGB", (20, 14), (220, 30, 30)).save(folder / "photo.png")


def _write_llava(
    folder: Path, text: LlamaConfig, vision: CLIPVisionConfig, words: Any, images: CLIPImageProcessor
) -> None:
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    shape = dict(text.to_dict(), vocab_size=len(words), num_hidden_layers=9)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**shape), image_token_index=words.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
