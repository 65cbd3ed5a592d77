"""An adapter and its own files: a JSON configuration and a safetensors file, nothing of the language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.io.state import assign, full_tensor
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.patching.vision_adapters import VisionTower, adapter_settings, adapters

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Adapter", "load", "load_into", "save", "upload", "write"]

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

    def part_of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's part of a MemVPModel's ``state_dict()``, by the names of :meth:`tensors`.

        Raises:
            ValueError: ``state`` lacks a tensor of it; every one is named.
        """
        memory = {name.removeprefix("memory."): t for name, t in state.items() if name.startswith("memory.")}
        part = {name.removeprefix("module."): t for name, t in memory.items()}  # data-parallel wrappers keep it there
        part |= {name: t for name, t in state.items() if name.startswith(_VISION)}
        missing = sorted(self.tensors().keys() - part.keys())
        if missing:
            raise ValueError(f"state_dict: wanted that of the MemVPModel, got one without {', '.join(missing)}")
        return {name: part[name] for name in self.tensors()}


def save(
    folder: str | Path,
    adapter: Adapter,
    state: dict[str, Tensor] | None = None,
    is_main_process: bool | None = None,
) -> bool:
    """Write both files, creating the folder.

    Args:
        folder: where.
        adapter: what.
        state: its tensors in full; None: gathered where they are sharded, so that every process must call this.
        is_main_process: whether this process writes; None: of several processes, the first does.

    Returns:
        Whether this process wrote.
    """
    state = adapter.state_dict() if state is None else state
    if is_main_process is None:
        is_main_process = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if is_main_process:
        write(folder, adapter, state)
    return is_main_process


def upload(
    folder: str | Path,
    *,
    repo_id: str,
    commit_message: str = "Upload MemVP adapter",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> None:
    """Upload both files to the Hugging Face hub, into a repository that is created if there is none."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    hub.upload_folder(
        repo_id=hub.create_repo(repo_id, private=private, exist_ok=True).repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
        allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
    )


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
    wanted = adapter.tensors()
    if adapter.vision is not None:  # what trained when it was saved may be frozen now
        wanted |= {f"{_VISION}{name}": t for name, t in adapter.vision.parameters(inside).items()}
    try:
        _check(wanted, state)
    except ValueError:
        if attached and adapter.vision is not None:
            adapter.vision.drop_adapters()
        raise
    for name, tensor in wanted.items():
        assign(tensor, state[name])
    if adapter.vision is not None:
        adapter.vision.train(inside)


def _check(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    unexpected = [name for name in state if name not in wanted]
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in unexpected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if any(name.startswith(_VISION) for name in unexpected):
        problems.append("pass a vision_model with the adapters (LoRA) that it was trained with")
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
