"""An adapter and its own files: a JSON configuration and a safetensors file, nothing of the language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.io.state import assign, full_tensor
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.patching.vision_adapters import VisionTower, adapter_settings, adapters

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Adapter", "load", "load_into", "save", "write"]

CONFIG_NAME = "memvp_config.json"
WEIGHTS_NAME = "memvp_model.safetensors"
_VISION = "vision_model."
_SETTINGS = "vision_adapters"  # entry of the safetensors file's metadata


class Adapter(NamedTuple):
    """Everything of a MemVPModel but the language model.

    Attributes:
        memory: the projector and the positions, with their configuration.
        vision: the vision model; None: it has none.
    """

    memory: VisualMemory
    vision: VisionTower | None

    def tensors(self) -> dict[str, Tensor]:
        """What trains, by name, as it is: sharding leaves this rank a part of each tensor."""
        tensors = dict(self.memory.state_dict())
        if self.vision is not None:
            tensors |= {f"{_VISION}{name}": tensor for name, tensor in self.vision.trainable().items()}
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """:meth:`tensors` in full. Where they are sharded, every rank must call this."""
        return {name: full_tensor(tensor) for name, tensor in self.tensors().items()}


def save(folder: str | Path, adapter: Adapter) -> None:
    """Write both files, creating the folder; of several processes, the first does."""
    state = adapter.state_dict()  # gathers where sharded, so every process gets here
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        write(folder, adapter, state)


def write(folder: str | Path, adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Write both files from ``state``, the adapter in full, in this process and without a message to any other."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter.memory.config.save(folder / CONFIG_NAME)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    settings = None if adapter.vision is None else adapter_settings(adapter.vision.module)
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


def load_into(adapter: Adapter, state: dict[str, Tensor], settings: dict[str, float] | None = None) -> None:
    """Copy ``state`` into the adapter, all of it or none.

    Args:
        adapter: its vision model is given adapters if ``state`` has any and it has none.
        state: tensors by name.
        settings: those of the vision model's adapters, scale and dropout.

    Raises:
        ValueError: names or shapes that do not fit, each named.
    """
    inside = {name.removeprefix(_VISION): t for name, t in state.items() if name.startswith(_VISION)}
    attached = bool(inside) and _prepare_vision(adapter.vision, inside, settings or {})
    try:
        _check(adapter.tensors(), state)
    except ValueError:
        if attached and adapter.vision is not None:
            adapter.vision.drop_adapters()
        raise
    for name, tensor in adapter.tensors().items():
        assign(tensor, state[name])


def _check(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"the adapter does not fit this language model and configuration: {'; '.join(problems)}")


def _prepare_vision(vision: VisionTower | None, state: dict[str, Tensor], settings: dict[str, float]) -> bool:
    """Give the vision model adapters of the saved size if it has none; whether that was done."""
    if vision is None:
        raise ValueError("the adapter has parameters for a vision model; pass vision_model=")
    fc1 = next((t for name, t in state.items() if name.endswith("adapter_mlp.fc1.weight")), None)
    if fc1 is None or adapters(vision.module):
        return False
    vision.give_adapters(hidden_dim=len(fc1), **settings)
    return True
