"""The adapter's own files: a JSON configuration and a safetensors file, nothing of the language model."""

from __future__ import annotations

import json
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
_SETTINGS = "vision_adapters"  # entry of the safetensors file's metadata


def save(folder: str | Path, model: MemVPModel) -> None:
    """Write both files, making the folder; of several processes, the first does."""
    from safetensors.torch import save_file

    state = model.adapter_state_dict()  # gathers where sharded, so every process gets here

    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.memvp_config.save(folder / CONFIG_NAME)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    settings = _vision_settings(model)
    save_file(tensors, folder / WEIGHTS_NAME, None if settings is None else {_SETTINGS: json.dumps(settings)})


def load(folder: str | Path) -> tuple[MemVPConfig, dict[str, Tensor], dict[str, float]]:
    """Read both files: the configuration, the tensors, and the settings of the vision model's adapters.

    Raises:
        FileNotFoundError: one is missing.
    """
    from safetensors import safe_open

    folder = Path(folder)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; it is not a folder that save_pretrained wrote")
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        settings = json.loads((file.metadata() or {}).get(_SETTINGS, "{}"))
    return MemVPConfig.load(folder / CONFIG_NAME), state, settings


def load_into(model: MemVPModel, state: dict[str, Tensor], settings: dict[str, float] | None = None) -> None:
    """Copy ``state`` into the model's adapter, all of it or none.

    Args:
        model: its vision model is given adapters if ``state`` has any and it has none.
        state: tensors by name.
        settings: those of the vision model's adapters, scale and dropout.

    Raises:
        ValueError: names or shapes that do not fit, each named.
    """
    inside = {name.removeprefix(_VISION): t for name, t in state.items() if name.startswith(_VISION)}
    if inside:
        _prepare_vision(model, inside, settings or {})
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


def _vision_settings(model: MemVPModel) -> dict[str, float] | None:
    for module in [] if model.vision_model is None else model.vision_model.modules():
        adapter = getattr(module, "adapter_mlp", None)
        if isinstance(adapter, vision.ClipAdapter):
            return {"dropout": adapter.dropout.p, "scale": float(module.adapter_scale)}  # type: ignore[arg-type]
    return None


def _prepare_vision(model: MemVPModel, state: dict[str, Tensor], settings: dict[str, float]) -> None:
    if model.vision_model is None:
        raise ValueError("the adapter has parameters for a vision model; pass vision_model=")
    if not vision.adapters(model.vision_model):
        fc1 = next((t for name, t in state.items() if name.endswith("adapter_mlp.fc1.weight")), None)
        if fc1 is not None:
            vision.attach_adapters(model.vision_model, hidden_dim=fc1.shape[0], **settings)
