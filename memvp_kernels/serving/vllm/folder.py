"""The one folder that vLLM serves: the base's files, and under ``memvp/`` the adapter and the vision model.

Nothing here needs vLLM.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.io import adapter
from memvp_kernels.models.memory.projector import Projector

if TYPE_CHECKING:
    from memvp_kernels.models import MemVPModel

__all__ = ["ARCHITECTURES", "ServedFolder", "export", "save_for_vllm"]

#: transformers' class of a base, and this plug-in's class for vLLM.
ARCHITECTURES = {
    f"{family}ForCausalLM": f"MemVP{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")
}

_ADAPTER = "memvp"
_VISION = "vision"
_CONFIG = "config.json"


class ServedFolder(NamedTuple):
    """What the server reads beside the base.

    Attributes:
        adapter: the folder with the adapter's two files.
        vision: a transformers CLIPVisionModel with its image processor; None where pictures are not served.
        config: the adapter's.
    """

    adapter: Path
    vision: Path | None
    config: MemVPConfig

    @staticmethod
    @functools.cache
    def of(model: str) -> ServedFolder:
        """Open what vLLM was told to serve.

        Args:
            model: a folder, or the name of a repository on the Hugging Face hub.

        Raises:
            FileNotFoundError: it has no adapter.
        """
        folder = _local(model, [f"{_ADAPTER}/*"])
        found = folder / _ADAPTER
        if not (found / adapter.CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{model} has no {_ADAPTER}/{adapter.CONFIG_NAME}; save_for_vllm writes it")
        vision = found / _VISION
        return ServedFolder(found, vision if vision.is_dir() else None, MemVPConfig.load(found / adapter.CONFIG_NAME))

    @property
    def rank(self) -> int:
        """r of a core."""
        return Projector(1, self.config.projector_dim, 1, device="meta").rank


def save_for_vllm(
    model: MemVPModel,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
) -> None:
    """Write one folder that ``vllm serve FOLDER`` takes.

    Args:
        model: a LLaMA, Mistral, Qwen2, Qwen3 or Gemma with its adapter, and its vision model if pictures are to be served.
        folder: made if it does not exist.
        base: the language model's own folder or repository. Its files are then linked instead of written anew, so its
            weights take no room twice. None: the language model is saved as it is.
        tokenizer: saved beside it. None: `base` has one, or requests come as token ids.
        image_processor: the vision model's, such as a CLIPImageProcessor. None: CLIP's own for the model's image size.

    Raises:
        ValueError: a language model that vLLM can't be given a memory in, or an adapter of ADEM-VL.
    """
    language_model = model.language_model
    if type(language_model).__name__ not in ARCHITECTURES:
        raise ValueError(
            f"save_for_vllm: wanted one of {', '.join(ARCHITECTURES)}, got {type(language_model).__name__}; a PEFT model is "
            "merged first (merge_and_unload) and wrapped again"
        )
    _refuse_relatives(model.memvp_config)
    folder = Path(folder)
    if base is None:
        language_model.save_pretrained(folder)
    else:
        _place(_local(str(base), None), folder, copy=False)
    _name_architecture(folder, folder)
    model.save_pretrained(folder / _ADAPTER)
    if model.vision_model is not None:
        _save_vision(model.vision_model, folder / _ADAPTER / _VISION, image_processor)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _check(folder)


def export(
    base: str | Path, saved: str | Path, folder: str | Path, *, vision: str | Path | None = None, copy: bool = False
) -> None:
    """Write the same folder from folders alone; no model is loaded.

    Args:
        base: the language model's folder or repository, with its tokenizer.
        saved: the adapter's folder, as `MemVPModel.save_pretrained` wrote it.
        folder: made if it does not exist.
        vision: the folder or repository of a CLIP vision model with its image processor; None: no pictures are served.
        copy: copy the files of base and vision model instead of linking them.

    Raises:
        FileNotFoundError: one of them is no such folder.
        ValueError: they do not fit each other.
    """
    folder = Path(folder)
    source = _local(str(base), None)
    if not (source / _CONFIG).is_file():
        raise FileNotFoundError(f"{base} has no {_CONFIG}; wanted a language model that save_pretrained wrote")
    _refuse_relatives(adapter.load(saved)[0])
    _place(source, folder, copy=copy)
    _name_architecture(source, folder)
    _place(Path(saved), folder / _ADAPTER, copy=True)
    if vision is not None:
        _place(_local(str(vision), None), folder / _ADAPTER / _VISION, copy=copy)
    _check(folder)


def _refuse_relatives(config: MemVPConfig) -> None:
    if config.class_token or config.pooled_grids or config.visual_map or config.visual_drop or config.visual_activation:
        raise ValueError(
            "this adapter is ADEM-VL's (MemVPConfig.adem_vl), or has a part of it, and the plug-in serves MemVP's alone; "
            "MemVPModel.generate runs it"
        )


def _local(model: str, patterns: list[str] | None) -> Path:
    """A folder on this machine: itself, or the cached snapshot of a repository."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=patterns))


def _place(source: Path, target: Path, *, copy: bool) -> None:
    """The files of one folder in another, by link or copy; subfolders (other formats of the same weights) stay behind."""
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is written, so it can't be read from as well; name another folder to serve")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.is_file():
            continue
        place = target / file.name
        place.unlink(missing_ok=True)
        if copy or file.name == _CONFIG:
            shutil.copyfile(file, place)
        else:
            place.symlink_to(file.resolve())


def _name_architecture(source: Path, folder: Path) -> None:
    """config.json with the class that vLLM is to make."""
    values = json.loads((source / _CONFIG).read_text())
    names = values.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES and names[0] not in ARCHITECTURES.values():
        raise ValueError(f"{source / _CONFIG}: wanted one of {', '.join(ARCHITECTURES)} in architectures, got {names}")
    values["architectures"] = [ARCHITECTURES.get(names[0], names[0])]
    (folder / _CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _save_vision(vision_model: Any, folder: Path, image_processor: Any) -> None:
    """The vision model without the adapters, which are in the adapter's own file."""
    own: dict[str, Tensor] = {k: v for k, v in vision_model.state_dict().items() if ".adapter_mlp." not in k}
    vision_model.save_pretrained(folder, state_dict=own)
    if image_processor is None:
        from transformers import CLIPImageProcessor

        size = vision_model.config.image_size
        image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    image_processor.save_pretrained(folder)


def _check(folder: Path) -> None:
    """Adapter, base and vision model fit each other, as far as their configurations say."""
    config, state, _ = adapter.load(folder / _ADAPTER)
    base = json.loads((folder / _CONFIG).read_text())
    width = state["key_position"].shape[-1]
    if width != base["hidden_size"]:
        raise ValueError(
            f"the adapter is for a language model of width {width}, and the base has {base['hidden_size']}"
        )
    config.chosen_layers(base["num_hidden_layers"])
    vision = folder / _ADAPTER / _VISION / _CONFIG
    if not vision.is_file():
        return
    settings = json.loads(vision.read_text())
    settings = settings.get("vision_config", settings)
    patches = (settings["image_size"] // settings["patch_size"]) ** 2
    if settings["hidden_size"] != config.vision_dim or patches > config.num_slots:
        raise ValueError(
            f"the adapter takes at most {config.num_slots} features of width {config.vision_dim}, and the vision model makes "
            f"{patches} of {settings['hidden_size']}"
        )
