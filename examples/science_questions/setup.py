"""The three pretrained parts from local folders or the hub, and a MemVPModel of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.patching.vision_adapters import attach_adapters
from science_questions.batches import Reader

__all__ = ["Parts", "adapter_of", "agree_on_settings", "new_adapter", "read_settings"]

SETTINGS = "settings.json"


class Parts(NamedTuple):
    """What an adapter is put between.

    Attributes:
        language_model: name or folder of a causal language model with its tokenizer.
        vision_model: name or folder of a CLIP vision model (the paper: CLIP ViT-L/14).
        dtype: of both; the adapter is float32.
        limit: most tokens of a prompt with its answer.
    """

    language_model: str
    vision_model: str
    dtype: torch.dtype
    limit: int

    def load(self) -> tuple[Any, CLIPVisionModel, Reader]:
        """The two models, frozen by what comes next, and the reader."""
        language_model = AutoModelForCausalLM.from_pretrained(self.language_model, dtype=self.dtype)
        vision_model = CLIPVisionModel.from_pretrained(self.vision_model, dtype=self.dtype)
        tokenizer = AutoTokenizer.from_pretrained(self.language_model)
        return language_model, vision_model, Reader(tokenizer, self.limit, vision_model.config.image_size)


def new_adapter(parts: Parts, *, num_slots: int, dropout: float, method: str = "memvp") -> tuple[MemVPModel, Reader]:
    """An untrained adapter with its paper's constants, and untrained CLIP adapters."""
    language_model, vision_model, reader = parts.load()
    attach_adapters(vision_model, dropout=dropout)
    config = _config(method, reader, vision_dim=vision_model.config.hidden_size, num_slots=num_slots, dropout=dropout)
    return MemVPModel(language_model, config, vision_model), reader


def adapter_of(parts: Parts, adapter: Path, *, method: str = "memvp") -> tuple[MemVPModel, Reader, dict[str, Any]]:
    """A trained adapter: a folder that training wrote, or a method's official ``.pth`` file; and what it was trained with."""
    language_model, vision_model, reader = parts.load()
    if adapter.is_dir():
        return MemVPModel.from_pretrained(language_model, adapter, vision_model), reader, read_settings(adapter)
    num_slots = 400 if method == "memvp" and language_model.config.hidden_size == 5120 else 320
    config = _config(method, reader, vision_dim=vision_model.config.hidden_size, num_slots=num_slots)
    model = MemVPModel(language_model, config, vision_model)
    report = model.load_official_checkpoint(adapter)
    return model, reader, {"captions": report.settings.get("use_caption"), "report": str(report)}


def _config(
    method: str, reader: Reader, *, vision_dim: int, num_slots: int, dropout: float | None = None
) -> MemVPConfig:
    """``dropout`` is MemVP's; ADEM-VL has none in the memory, and words around the class token."""
    if method == "memvp":
        extra = {} if dropout is None else {"dropout": dropout}
        return MemVPConfig(vision_dim=vision_dim, num_slots=num_slots, **extra)
    prefixes = [reader.tokenizer(text, add_special_tokens=False).input_ids for text in ("Image: ", "Image: N/A")]
    return MemVPConfig.adem_vl(
        vision_dim=vision_dim, num_slots=num_slots, image_prefix=prefixes[0], text_prefix=prefixes[1]
    )


def agree_on_settings(state: PartialState, folder: Path, **settings: Any) -> None:
    """Note what evaluation has to do alike; a run that goes on must not change it.

    The main process alone sees the folder, and its verdict is every process's: one that raised alone would leave the others
    waiting for it.

    Raises:
        ValueError: the folder has other settings.
    """
    verdict: list[str | None] = [_note(folder, settings) if state.is_main_process else None]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise ValueError(verdict[0])


def _note(folder: Path, settings: dict[str, Any]) -> str | None:
    """Why the folder cannot be used; None once they are noted."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS).is_file() and (before := read_settings(folder)) != settings:
        return f"{folder} was trained with {before}, not {settings}; take another folder"
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return None


def read_settings(folder: Path) -> dict[str, Any]:
    """What :func:`agree_on_settings` noted."""
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return settings
