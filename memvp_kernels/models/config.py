"""What a MemVP adapter is made of, as plain data that survives a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from memvp_kernels.checks import ACTIVATIONS, FEATURE_MAPS, IDENTITY

__all__ = ["MemVPConfig"]


@dataclass(frozen=True, kw_only=True)
class MemVPConfig:
    """Shape and constants of a MemVP adapter; the defaults are the paper's for LLaMA-7B (arXiv 2405.05615, section 4).

    Slot j of an image's memory is the pair (λ f(z_j) + p^k_j, λ f(z_j) + p^v_j), f(z_j) its j-th feature, projected. An image of
    n features fills the first n of M slots. The rest are free: (p^k_j, p^v_j), learned, alike for every image and for text alone.

    λ and s act at different places. What the memory adds to the FFN's output is linear in s. λ is in the key and in the value of
    every slot with a feature, so the image's part grows faster than λ: at small scores with its square. Change λ where the
    features have another size than CLIP's, s where the memory as a whole adds too little or too much;
    ``MemVPModel.explain_memory`` prints how much it adds.

    The memory goes into every layer unless ``layers`` names some. Each layer named less is that layer's share of the cost less;
    keep early ones, since what late layers read no attention compares with the text.

    Attributes:
        vision_dim: width of an image feature (CLIP ViT-L/14: 1024).
        projector_dim: inner width of the projector Linear, SiLU, Linear.
        num_slots: M, memory slots per image: the features of the largest image and as many free slots as there should be.
        feature_scale: λ, multiplies the projected features.
        memory_scale: s, multiplies the memory's contribution to the FFN output; or one per layer with memory, in the order
            in which they run.
        dropout: probability of dropping a visual activation in training.
        shared_positions: one (p^k, p^v) for all layers, as in the official code; False: one pair per layer.
        layers: indices of the layers that get memory, counted from 0 in the order in which they run; None: all. In T5 and
            BART, whose encoder and decoder FFNs both take memory, the encoder's come first: of 12 and 12 layers,
            ``range(12, 24)`` is the decoder alone. ``MemVPModel.memory_ffns()`` names what was chosen.
        pooled_grids: of an image's square grid of features, average-pooled grids of these many cells are the memory instead, one
            after the other; (): the features themselves. ADEM-VL: (256, 64).
        class_token: the first feature is the image's class token, which is no slot but begins the prompt by a projector of its
            own, not scaled by λ. Decoder-only models.
        image_prefix: token ids that the model puts between a prompt's BOS and its class token.
        text_prefix: token ids that the model puts behind the BOS of a prompt without an image.
        visual_activation: of the memory's scores, a name of :func:`memvp_kernels.fused_ffn`; None: the FFN's own.
        visual_map: "silu": the scores are silu(x)·silu(Kv)ᵀ; None: x·Kvᵀ.
        visual_drop: γ in [0, 1), each token's share of lowest scores that is left out, in training and inference.

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
    pooled_grids: tuple[int, ...] = ()
    class_token: bool = False
    image_prefix: tuple[int, ...] = ()
    text_prefix: tuple[int, ...] = ()
    visual_activation: str | None = None
    visual_map: str | None = None
    visual_drop: float = 0.0

    @classmethod
    def adem_vl(cls, *, pooled_grids: Sequence[int] = (256, 64), **changes: Any) -> MemVPConfig:
        """ADEM-VL with its paper's constants (arXiv 2410.17779): 256 patches and their 8 × 8 averages, the class token in the prompt.

        Args:
            pooled_grids: as the attribute; M is their sum.
            **changes: other attributes that differ. The official prompts have ``image_prefix`` = the ids of ``"Image: "`` and
                ``text_prefix`` = those of ``"Image: N/A"``, as ``tokenizer(…, add_special_tokens=False).input_ids``.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        preset: dict[str, Any] = {
            "num_slots": sum(_integers("pooled_grids", pooled_grids)) or cls.num_slots,
            "dropout": 0.0,
            "class_token": True,
            "visual_activation": "identity",
            "visual_map": "silu",
            "visual_drop": 0.1,
        }
        return cls(pooled_grids=tuple(pooled_grids), **preset | changes)

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
            ("visual_drop", self.visual_drop),
            *(("memory_scale", s) for s in each),
        ]
        for name, number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} must be a float, got {number!r} ({type(number).__name__})")
            if not -float("inf") < number < float("inf"):
                raise ValueError(f"{name} must be finite, got {number}")
        for name in ("dropout", "visual_drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("shared_positions", "class_token"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        for name in ("pooled_grids", "image_prefix", "text_prefix"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        for name, known in (("visual_activation", (*ACTIVATIONS, IDENTITY)), ("visual_map", FEATURE_MAPS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} must be None or one of {', '.join(known)}, got {value!r}")
        uneven = [cells for cells in self.pooled_grids if cells < 1 or math.isqrt(cells) ** 2 != cells]
        if uneven:
            raise ValueError(f"pooled_grids must be numbers of cells of square grids, such as 256 and 64, got {uneven}")
        if sum(self.pooled_grids) > self.num_slots:
            raise ValueError(
                f"pooled_grids {self.pooled_grids} are {sum(self.pooled_grids)} slots, num_slots is {self.num_slots}"
            )
        if (self.image_prefix or self.text_prefix) and not self.class_token:
            raise ValueError("image_prefix and text_prefix stand around the class token; pass class_token=True")

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
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

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


def _integers(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple, range)) or not all(_is_integer(value) for value in values):
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
    return tuple(values)


def _checked_layers(layers: object) -> tuple[int, ...]:
    indices = _integers("layers", layers)
    if not indices:
        raise ValueError("layers is empty: no layer would see the image; None means all layers")
    if min(indices) < 0:
        raise ValueError(f"layers counts from 0, got {min(indices)}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"layers names an index twice: {list(indices)}")
    return tuple(sorted(indices))
