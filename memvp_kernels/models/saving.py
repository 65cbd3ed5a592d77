"""The adapter's own files: a JSON configuration and a safetensors file, nothing of the language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from memvp_kernels.models import vision
from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.state import assign

if TYPE_CHECKING:
    from memvp_kernels.models.model import MemVPModel

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "load", "load_into", "save"]

CONFIG_NAME = "memvp_config.json"
WEIGHTS_NAME = "memvp_model.safetensors"
_VISION = "vision_model."


def save(folder: str | Path, config: MemVPConfig, state: dict[str, Tensor]) -> None:
    """Write both files, making the folder; of several processes, the first does."""
    from safetensors.torch import save_file

    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / CONFIG_NAME)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_NAME)


def load(folder: str | Path) -> tuple[MemVPConfig, dict[str, Tensor]]:
    """Read both files.

    Raises:
        FileNotFoundError: one is missing.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; it is not a folder that save_pretrained wrote")
    return MemVPConfig.load(folder / CONFIG_NAME), load_file(folder / WEIGHTS_NAME)


def load_into(model: MemVPModel, state: dict[str, Tensor]) -> None:
    """Copy ``state`` into the model's adapter, all of it or none.

    Raises:
        ValueError: names or shapes that do not fit, each named.
    """
    vision = {name.removeprefix(_VISION): t for name, t in state.items() if name.startswith(_VISION)}
    if vision:
        _prepare_vision(model, vision)
    wanted = model.adapter_tensors()
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"the adapter does not fit this language model and configuration: {'; '.join(problems)}")
    for name, tensor in wanted.items():
        assign(tensor, state[name])


def _prepare_vision(model: MemVPModel, state: dict[str, Tensor]) -> None:
    if model.vision_model is None:
        raise ValueError("the adapter has parameters for a vision model; pass vision_model=")
    if not vision.adapters(model.vision_model):
        fc1 = next((t for name, t in state.items() if name.endswith("adapter_mlp.fc1.weight")), None)
        if fc1 is not None:
            vision.attach_adapters(model.vision_model, hidden_dim=fc1.shape[0])
