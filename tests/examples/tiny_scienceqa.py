"""A dozen questions in ScienceQA's official layout, and a tiny language model, tokenizer and CLIP to answer them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SUBJECTS = ("natural science", "social science", "language science")
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 210)}


def problems() -> dict[str, dict[str, Any]]:
    """Every subject, grades 1 to 12, with and without hint, image and caption; the answers A, B and C in turn."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(12):
        color = list(COLORS)[number % 3]
        pictured = number % 2 == 0
        found[str(number + 1)] = {
            "question": f"Which color is thing {number}?",
            "choices": [*COLORS],
            "answer": number % 3,
            "hint": "" if number % 4 in (0, 1) else f"The thing is {color}.",
            "image": "image.png" if pictured else None,
            "task": "closed choice",
            "grade": f"grade{number + 1}",
            "subject": SUBJECTS[number % 3],
            "topic": "colors",
            "category": "colors",
            "skill": "see",
            "lecture": "",
            "solution": "",
            "split": "train" if number < 8 else "test",
        }
    return found


def write_data(folder: Path) -> Path:
    """The four parts of the official layout."""
    folder.mkdir(parents=True)
    found = problems()
    splits = {name: [key for key, entry in found.items() if entry["split"] == name] for name in ("train", "test")}
    captions = {key: f"A {[*COLORS][entry['answer']]} square." for key, entry in found.items() if entry["image"]}
    (folder / "problems.json").write_text(json.dumps(found))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    (folder / "captions.json").write_text(json.dumps({"captions": captions}))
    for key, entry in found.items():
        if entry["image"]:
            path = folder / "images" / entry["split"] / key / "image.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (20, 14), COLORS[[*COLORS][entry["answer"]]]).save(path)
    return folder


def tokenizer(*, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> PreTrainedTokenizerFast:
    """Words and marks, with LLaMA's special tokens: no pad."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [" ".join([e["question"], e["hint"], *e["choices"]]) for e in problems().values()]
    fixed = "Question: Context: Options: (A) (B) (C) (D) (E) Response: The answer is A. N/A A square."
    inner.train_from_iterator([*texts, fixed], trainers.WordLevelTrainer(special_tokens=list(special)))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama_config(words: PreTrainedTokenizerFast, **more: Any) -> LlamaConfig:
    """Of two layers, with the tokenizer's tokens."""
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **more,
    )


def clip_config() -> CLIPVisionConfig:
    """Four patches of an 8 × 8 image."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(image_size=8, patch_size=4, **sizes)


def write_models(folder: Path) -> tuple[Path, Path]:
    """Folders of a language model with its tokenizer, and of a CLIP vision model."""
    torch.manual_seed(0)
    words = tokenizer()
    words.save_pretrained(folder / "lm")
    LlamaForCausalLM(llama_config(words)).save_pretrained(folder / "lm")
    CLIPVisionModel(clip_config()).save_pretrained(folder / "clip")
    return folder / "lm", folder / "clip"
