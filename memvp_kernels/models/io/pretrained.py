"""The part of a MemVPModel that reads and writes its adapter."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from memvp_kernels.models.io import adapter as files
from memvp_kernels.models.io.official_checkpoint import CheckpointReport, load_official_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PretrainedAdapter"]


class PretrainedAdapter:
    """What a model says of its adapter's files, under the names of transformers and PEFT."""

    def adapter(self) -> files.Adapter:
        """The memory and the vision model, as files see them."""
        raise NotImplementedError

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """What :meth:`save_pretrained` writes: the memory, and the vision model's trainable parameters.

        In full: where they are sharded, every rank must call this.
        """
        return self.adapter().state_dict()

    def load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`adapter_state_dict`.

        Raises:
            ValueError: a key too many or too few, or another shape; every one is named, and nothing is loaded.
        """
        files.load_into(self.adapter(), state)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
        save_function: Callable[..., Any] | None = None,
        **hub: Any,
    ) -> None:
        """Write the adapter alone: ``memvp_config.json`` and ``memvp_model.safetensors``.

        Args:
            folder: created if there is none.
            is_main_process: whether this process writes; None: of several processes, the first does.
            state_dict: this model's, gathered by a tool; None: where the adapter is sharded, every process must call this.
            push_to_hub: upload it too. ``hub`` are then :meth:`push_to_hub`'s options; ``repo_id`` is by default the
                folder's name.
            safe_serialization, max_shard_size, save_function: taken since tools pass them; it is one small safetensors file.

        Raises:
            ValueError: ``safe_serialization=False``, or a ``state_dict`` of something else.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: an adapter is written as safetensors alone; leave it out")
        if hub and not push_to_hub:
            raise TypeError(
                f"save_pretrained: unknown options {sorted(hub)}; those of push_to_hub need push_to_hub=True"
            )
        adapter = self.adapter()
        state = adapter.state_dict() if state_dict is None else adapter.part_of(state_dict)
        written = files.save(folder, adapter, state, is_main_process)
        if push_to_hub and written:
            files.upload(folder, **{"repo_id": Path(folder).name} | hub)

    @classmethod
    def from_pretrained(
        cls, language_model: nn.Module, folder: str | Path, vision_model: nn.Module | None = None, **options: Any
    ) -> Self:
        """Wrap ``language_model`` with an adapter that :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: an adapter for another size; language model and vision model are given back as they were.
        """
        config, state, settings = files.load(folder)
        model = cls(language_model, config, vision_model, **options)  # type: ignore[call-arg]
        try:
            files.load_into(model.adapter(), state, settings)
        except Exception:
            model.unload()  # type: ignore[attr-defined]
            raise
        return model

    def load_official_checkpoint(self, path: str | Path, *, vision_adapters: bool = True) -> CheckpointReport:
        """Load one of the official repository's ``.pth`` files; see :func:`~.official_checkpoint.load_official_checkpoint`."""
        return load_official_checkpoint(self.adapter(), path, vision_adapters=vision_adapters)

    def push_to_hub(self, repo_id: str, **hub: Any) -> None:
        """Upload the adapter to the Hugging Face hub.

        Args:
            repo_id: created if there is none.
            **hub: ``commit_message``, ``private``, ``token``, ``revision``, ``create_pr``.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **hub)
