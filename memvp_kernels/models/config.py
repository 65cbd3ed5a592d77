"""What a MemVP adapter is made of, as plain data that survives a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["MemVPConfig"]


@dataclass(frozen=True, kw_only=True)
class MemVPConfig:
    """Shape and constants of a MemVP adapter; the defaults are the paper's for LLaMA-7B (arXiv 2405.05615, section 4).

    Attributes:
        vision_dim: width of an image feature (CLIP ViT-L/14: 1024).
        projector_dim: inner width of the projector Linear, SiLU, Linear.
        num_slots: M, memory slots per image; those past the image's own features are free learned memory.
        feature_scale: λ, multiplies the projected features.
        memory_scale: s, multiplies the memory's contribution to the FFN output; or one per layer with memory, in the order
            in which they run.
        dropout: probability of dropping a visual activation in training.
        shared_positions: one (p^k, p^v) for all layers, as in the official code; False: one pair per layer.
        layers: indices of the layers that get memory, counted from 0 in the order in which they run; None: all. In T5 and
            BART, whose encoder and decoder FFNs both take memory, the encoder's come first: of 12 and 12 layers,
            ``range(12, 24)`` is the decoder alone. ``MemVPModel.memory_ffns()`` names what was chosen.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.
    """

    vision_dim: int = 1024
    projector_dim: int = 128
    num_slots: int = 320
    feature_scale: float = 0.01
    memory_scale: float | tuple[float, ...] = 0.1
    dropout: float = 0.1
    shared_positions: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("vision_dim", "projector_dim", "num_slots"):
            size = getattr(self, name)
            if not _is_integer(size):
                raise TypeError(f"{name} must be an int, got {size!r} ({type(size).__name__})")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if isinstance(self.memory_scale, list):  # as JSON has it
            object.__setattr__(self, "memory_scale", tuple(self.memory_scale))
        each = self.memory_scale if isinstance(self.memory_scale, tuple) else (self.memory_scale,)
        if not each:
            raise ValueError("memory_scale is empty; one number for all layers, or one per layer with memory")
        numbers = [
            ("feature_scale", self.feature_scale),
            ("dropout", self.dropout),
            *(("memory_scale", s) for s in each),
        ]
        for name, number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a float, got {number!r} ({type(number).__name__})")
            if not -float("inf") < number < float("inf"):
                raise ValueError(f"{name} must be finite, got {number}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not isinstance(self.shared_positions, bool):
            raise TypeError(f"shared_positions must be a bool, got {self.shared_positions!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))

    def chosen_layers(self, count: int) -> tuple[int, ...]:
        """The indices that get memory in a model of ``count`` layers.

        Raises:
            ValueError: ``layers`` names one that the model does not have, or ``memory_scale`` is for another number of them.
        """
        chosen = tuple(range(count)) if self.layers is None else self.layers
        missing = [index for index in chosen if index >= count]
        if missing:
            raise ValueError(f"layers {missing} do not exist: the language model has {count} layers, 0 to {count - 1}")
        if isinstance(self.memory_scale, tuple) and len(self.memory_scale) != len(chosen):
            raise ValueError(f"memory_scale: wanted {len(chosen)} numbers, one per layer, got {len(self.memory_scale)}")
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, one per attribute."""
        values = asdict(self)
        if values["layers"] is not None:
            values["layers"] = list(values["layers"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemVPConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a name that is not an attribute (a typo, or a file of a later version).
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown MemVPConfig entries {unknown}; known are {known}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> MemVPConfig:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not a MemVPConfig.
        """
        values = json.loads(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, (list, tuple, range)) or not all(_is_integer(index) for index in layers):
        raise TypeError(f"layers must be None or a sequence of ints, got {layers!r}")
    indices = tuple(layers)
    if not indices:
        raise ValueError("layers is empty: no layer would see the image; None means all layers")
    if min(indices) < 0:
        raise ValueError(f"layers counts from 0, got {min(indices)}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers names an index twice: {list(indices)}")
    return tuple(sorted(indices))
