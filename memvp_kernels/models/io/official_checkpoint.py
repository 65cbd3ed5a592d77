"""The official repository's ``.pth`` files, read safely and checked whole before anything is changed."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.io.adapter import Adapter
from memvp_kernels.models.memory.vision_tower import tower
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.patching.vision_adapters import VisionTower, adapter_settings, adapters

__all__ = ["CheckpointReport", "load_official_checkpoint"]

Targets: TypeAlias = "dict[str, tuple[str, Tensor]]"  # checkpoint key → name and parameter it is written to

_FEATURE_SCALE = 0.01  # λ is a constant of the official code, not stored in its files
_CLIP_SCALE = 0.1  # of the CLIP adapters, likewise
_POSITIONS = ("adapter_emb1", "adapter_emb2")  # stored with a leading batch dimension of one
_NAMED_SIZES = {(320, 4096): "LLaMA-7B", (400, 5120): "LLaMA-13B"}
_UNUSED = {"adapter_modality_embedding.weight": "the official code trains it and never reads it"}
_CLASS_TOKEN = "adapter_proj_cls."
_CLIP_KEY = re.compile(r"backbone\.visual\.transformer\.resblocks\.(\d+)\.adapter_mlp\.(fc1|fc2)\.weight")


@dataclass(frozen=True)
class CheckpointReport:
    """What went where.

    Attributes:
        path: the file.
        loaded: checkpoint key → the parameter it was written to.
        unused: checkpoint key → why it has no place.
        epoch: the epoch that the file was saved after; None when it doesn't say.
        settings: the command line that trained it; empty when it doesn't say.
    """

    path: str
    loaded: dict[str, str]
    unused: dict[str, str]
    epoch: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(len(key) for key in (*self.loaded, *self.unused))
        lines = [f"{self.path}: {len(self.loaded)} tensors loaded, {len(self.unused)} without use"]
        lines += [f"  {key:<{width}}  -> {target}" for key, target in self.loaded.items()]
        lines += [f"  {key:<{width}}  unused: {reason}" for key, reason in self.unused.items()]
        return "\n".join(lines)


def load_official_checkpoint(adapter: Adapter, path: str | Path, *, vision_adapters: bool = True) -> CheckpointReport:
    """Write an official checkpoint into an adapter: MemVP's (github.com/JieShibo/MemVP) or ADEM-VL's (github.com/Hao840/ADEM-VL).

    Keys may start with ``module.`` (saved under torchrun). The CLIP adapters go into the vision model, which gets them
    if it has none. The file is opened with ``weights_only=True``: the one class it may name is argparse.Namespace.

    Args:
        adapter: built with the checkpoint's sizes: LLaMA-7B and 320 slots, or LLaMA-13B and 400 (ADEM-VL: 320) slots.
        path: the ``.pth`` file.
        vision_adapters: False: leave the CLIP adapters out, for a model whose image features are computed elsewhere,
            by a CLIP that has them.

    Returns:
        What went where; print it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint; a key is missing or unknown; a size differs (both are named); the model's
            constants are not those it was trained with; it has CLIP adapters and the model no place for them. Nothing
            is changed then.
    """
    saved = _read(Path(path))
    state = {key.removeprefix("module."): tensor for key, tensor in saved["model"].items()}
    settings = vars(saved["args"]) if isinstance(saved.get("args"), argparse.Namespace) else {}
    _check_constants(adapter.memory.config, settings, state)

    targets = _memory_targets(adapter.memory)
    clip = {key: match for key in state if (match := _CLIP_KEY.fullmatch(key))}
    unused = {key: reason for key, reason in _UNUSED.items() if key in state}
    _check_names(state, targets, [*clip, *unused])
    values = {key: state[key].squeeze(0) if key in _POSITIONS else state[key] for key in targets}
    _check_memory_sizes(values, targets)
    if clip and vision_adapters:
        clip_targets, clip_unused = _clip_targets(adapter.vision, state, clip)
        targets |= clip_targets
        unused |= clip_unused
    elif clip:
        unused |= dict.fromkeys(clip, "left out by vision_adapters=False")

    with torch.no_grad():
        for key, (_, parameter) in targets.items():
            parameter.copy_(values.get(key, state[key]))
    return CheckpointReport(
        path=str(path),
        loaded={key: name for key, (name, _) in targets.items()},
        unused=unused,
        epoch=saved.get("epoch"),
        settings=settings,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not all(isinstance(tensor, Tensor) for tensor in model.values()):
        got = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{path} is not an official checkpoint: wanted a dict with 'model' in it, got {got}")
    return saved


def _check_constants(config: MemVPConfig, settings: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """The checkpoint's parameters mean nothing under other constants, and loading would not show it."""
    relative = "drop_ratio" in settings or any(key.startswith(_CLASS_TOKEN) for key in state)
    # without settings and class token the two methods' files have the same names, but for what MemVP alone never uses
    relative |= not settings and config.visual_map is not None and not _UNUSED.keys() & state.keys()
    wanted: dict[str, Any] = {"shared_positions": True, "layers": None}
    wanted |= _adem_vl_constants(settings, state) if relative else _memvp_constants(settings)
    wrong = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    if wrong:
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        way_out = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        preset = "MemVPConfig.adem_vl" if relative else "MemVPConfig"
        raise ValueError(f"the checkpoint was not trained with {got}; build the model with {preset}({way_out})")
    if config.class_token and not (config.image_prefix and config.text_prefix):
        raise ValueError(
            'the checkpoint was trained with "Image: " in front of the class token, and "Image: N/A" in prompts without an '
            "image; give their token ids, tokenizer(…, add_special_tokens=False).input_ids, to MemVPConfig.adem_vl(image_prefix=…, "
            "text_prefix=…)"
        )


def _memvp_constants(settings: dict[str, Any]) -> dict[str, Any]:
    plain = MemVPConfig()
    names = ("visual_activation", "visual_map", "visual_drop", "pooled_grids", "class_token")
    constants = {"feature_scale": _FEATURE_SCALE} | {name: getattr(plain, name) for name in names}
    return constants | ({"memory_scale": settings["adapter_scale"]} if "adapter_scale" in settings else {})


def _adem_vl_constants(settings: dict[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """By the names of its command line; its paper's where the file does not say."""
    paper = MemVPConfig.adem_vl()
    return {
        "feature_scale": settings.get("beta", paper.feature_scale),
        "memory_scale": settings.get("alpha", paper.memory_scale),
        "visual_drop": settings.get("drop_ratio", paper.visual_drop),
        "pooled_grids": tuple(settings.get("down_sample_num", paper.pooled_grids)),
        "visual_activation": paper.visual_activation,
        "visual_map": paper.visual_map,
        "class_token": any(key.startswith(_CLASS_TOKEN) for key in state),
    }


def _memory_targets(memory: VisualMemory) -> Targets:
    targets: Targets = {
        "adapter_emb1": ("key_position", memory.key_position),
        "adapter_emb2": ("value_position", memory.value_position),
    }
    for prefix, name in (("adapter_proj.", "projector"), (_CLASS_TOKEN, "class_projector")):
        projector = getattr(memory, name)
        if projector is not None:
            targets |= {f"{prefix}{part}": (f"{name}.{part}", p) for part, p in projector.named_parameters()}
    return targets


def _check_names(state: dict[str, Tensor], required: Iterable[str], optional: Iterable[str]) -> None:
    missing = sorted(set(required) - set(state))
    unknown = sorted(set(state) - set(required) - set(optional))
    if missing or unknown:
        parts = [f"lacks {missing}"] * bool(missing) + [f"has unknown keys {unknown}"] * bool(unknown)
        raise ValueError(f"not an official checkpoint for LLaMA: it {' and '.join(parts)}")


def _check_memory_sizes(values: dict[str, Tensor], targets: Targets) -> None:
    wrong = _wrong_sizes(values, targets)
    if not wrong:
        return
    _, parameter = targets["adapter_emb1"]
    way_out = "; wrap the language model it was trained on"
    if values["adapter_emb1"].shape[-1] == parameter.shape[-1]:
        num_slots, (projector_dim, vision_dim) = len(values["adapter_emb1"]), values["adapter_proj.fc1.weight"].shape
        way_out = (
            f"; MemVPConfig(num_slots={num_slots}, projector_dim={projector_dim}, vision_dim={vision_dim}) would fit"
        )
    raise ValueError(
        f"the checkpoint is for {_size(values['adapter_emb1'])}, this model is {_size(parameter)}: "
        f"{'; '.join(wrong)}{way_out}"
    )


def _size(position: Tensor) -> str:
    slots, width = position.shape[-2:]
    name = _NAMED_SIZES.get((slots, width))
    return f"width {width} with {slots} slots" + (f" ({name})" if name else "")


def _wrong_sizes(values: Mapping[str, Tensor], targets: Targets) -> list[str]:
    return [
        f"{key} is {tuple(values[key].shape)}, {name} is {tuple(parameter.shape)}"
        for key, (name, parameter) in targets.items()
        if values[key].shape != parameter.shape
    ]


def _clip_targets(
    vision: VisionTower | None, state: dict[str, Tensor], clip: dict[str, re.Match[str]]
) -> tuple[Targets, dict[str, str]]:
    """Where each CLIP key goes, and the keys of the block that is never run. Attaches adapters once all is known to fit."""
    if vision is None:
        raise ValueError(
            f"the checkpoint has {len(clip)} CLIP adapter tensors and the model no vision_model to take them: pass "
            "MemVPModel(…, vision_model=CLIPVisionModel…), or vision_adapters=False if a CLIP with these adapters "
            "computes the image features elsewhere"
        )
    vision_model = vision.module
    layers = tower(vision_model).encoder.layers
    present = {(int(match[1]), match[2]) for match in clip.values()}
    if present != {(block, name) for block in range(len(layers)) for name in ("fc1", "fc2")}:
        raise ValueError(
            f"the checkpoint has {len(clip)} adapter tensors for {len({block for block, _ in present})} CLIP blocks, "
            f"vision_model has {len(layers)} blocks with two each; the official checkpoints are for CLIP ViT-L/14"
        )
    attached, settings = adapters(vision_model), adapter_settings(vision_model)
    if settings is not None and settings["scale"] != _CLIP_SCALE:
        raise ValueError(
            f"the checkpoint's CLIP adapters were not trained with scale={settings['scale']}; call "
            f"detach_adapters(vision_model) first, or attach them with scale={_CLIP_SCALE}"
        )
    width = layers[0].mlp.fc1.in_features
    hidden_dim = (
        attached[0].fc1.out_features if attached else len(state[next(k for k, m in clip.items() if m[2] == "fc1")])
    )
    shapes = {"fc1": (hidden_dim, width), "fc2": (width, hidden_dim)}
    wrong = [key for key, match in clip.items() if tuple(state[key].shape) != shapes[match[2]]]
    if wrong:
        raise ValueError(
            f"the checkpoint's CLIP adapters do not fit vision_model: {wrong[0]} is {tuple(state[wrong[0]].shape)}, "
            f"wanted {shapes[clip[wrong[0]][2]]} ({len(wrong)} tensors differ)"
        )

    attached = attached or vision.give_adapters(hidden_dim=hidden_dim, scale=_CLIP_SCALE)
    names = {parameter: name for name, parameter in vision_model.named_parameters()}
    targets: Targets = {}
    for key, match in clip.items():
        if int(match[1]) < len(attached):
            parameter = getattr(attached[int(match[1])], match[2]).weight
            targets[key] = (f"vision_model.{names[parameter]}", parameter)
    reason = "belongs to the last CLIP block, which is never run"
    return targets, {key: reason for key in clip if key not in targets}
