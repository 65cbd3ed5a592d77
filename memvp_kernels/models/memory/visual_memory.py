"""The memory of a batch, and the module that holds everything that MemVP trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, register_pytree_node

from memvp_kernels.models.config import MemVPConfig
from memvp_kernels.models.memory.projector import Projector
from memvp_kernels.shared_memory import SharedMemory

__all__ = ["ClassToken", "Memory", "Observer", "Readers", "VisualMemory"]

_POSITION_STD = 0.02  # of p^k at the start, as in the official code; p^v starts at zero

Observer = Callable[[int, Tensor, Tensor], None]


class Readers:
    """Which layers have read a memory: an attribute each, so that a compiled layer adds its own without reading others'."""

    def add(self, layer: int) -> None:
        """The FFN of this layer has read it."""
        setattr(self, f"layer_{layer}", True)

    def lacks(self, layer: int) -> bool:
        """Whether the FFN of this layer has not."""
        return not hasattr(self, f"layer_{layer}")


class ClassToken(NamedTuple):
    """What an image puts into its prompt.

    Attributes:
        core: (R, 1, r), the class token's factors.
        embedding: (R, d).
        present: (R,) bool, False for a row without an image.
    """

    core: Tensor
    embedding: Tensor
    present: Tensor


@dataclass(eq=False)
class Memory:
    """What every FFN of a forward pass reads; a pytree of its tensors, so that sharding and export carry it along.

    Attributes:
        core: (R, M, r), one row per image; R = 1 and more sequences share or skip rows through an index.
        basis: (r, d), λ·W.
        key_position: p^k, (M, d), or (layers, M, d) when each layer has its own.
        value_position: p^v, shaped like ``key_position``.
        scale: s, or one per layer with memory.
        dropout: of the visual activations; 0.0 outside training.
        visual_activation, visual_map, visual_drop: passed to :func:`memvp_kernels.fused_ffn`.
        backend, recompute: passed to :func:`memvp_kernels.fused_ffn`.
        observer: called with (position among the layers with memory, the FFN's input x, its output) by each FFN.
        readers: the layers that have read it.
        shard: under tensor parallelism, what this rank computes of it.
        class_token: for the prompt, from where it has to be taken out: no layer reads it.
        shared: the tensors above as the FFNs read them, cast and joined once; no part of the pytree.
    """

    core: Tensor
    basis: Tensor
    key_position: Tensor
    value_position: Tensor
    scale: float | tuple[float, ...]
    dropout: float
    visual_activation: str | None = None
    visual_map: str | None = None
    visual_drop: float = 0.0
    backend: str = "auto"
    recompute: bool = False
    observer: Observer | None = None
    readers: Readers | None = None
    shard: Memory | None = None
    class_token: ClassToken | None = None
    shared: SharedMemory | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        """Itself: assisted decoding copies all arguments, and nobody writes to a memory."""
        return self

    def positions(self, layer: int) -> tuple[Tensor, Tensor]:
        """(p^k, p^v), each (M, d), of the layer-th FFN that has memory."""
        if self.key_position.dim() == 2:
            return self.key_position, self.value_position
        return self.key_position[layer], self.value_position[layer]

    def scale_of(self, layer: int) -> float:
        """s of the layer-th FFN that has memory."""
        return self.scale[layer] if isinstance(self.scale, tuple) else self.scale

    def to(self, target: torch.dtype | torch.device) -> Memory:
        """The same memory with every tensor in a dtype, or on a device, where device maps send it."""
        moved = {name: getattr(self, name).to(target) for name in _TENSORS}
        if all(tensor is getattr(self, name) for name, tensor in moved.items()):
            return self
        return replace(self, **moved, shared=None)

    def sharing(self, dtype: torch.dtype, materialize: bool = False) -> Memory:
        """With ``shared``, for FFNs that compute in ``dtype``."""
        parts = (self.core, self.basis, self.key_position, self.value_position)
        return replace(self, shared=SharedMemory(*parts, dtype, visual_map=self.visual_map, materialize=materialize))

    def close(self) -> None:
        """The forward is over."""
        for memory in (self, self.shard):
            if memory is not None and memory.shared is not None:
                memory.shared.close()


_TENSORS = ("core", "basis", "key_position", "value_position")
_CHILDREN = (*_TENSORS, "class_token")
_REST = tuple(field.name for field in fields(Memory) if field.name not in _CHILDREN)


def _flatten(memory: Memory) -> tuple[list[Any], tuple[Any, ...]]:
    children = _CHILDREN if memory.class_token is not None else _TENSORS
    return [getattr(memory, name) for name in children], tuple(getattr(memory, name) for name in _REST)


register_pytree_node(
    Memory,
    _flatten,
    lambda children, rest: Memory(
        **dict(zip(_CHILDREN, children, strict=False)), **dict(zip(_REST, rest, strict=True))
    ),
    serialized_type_name=f"{Memory.__module__}.Memory",
    flatten_with_keys_fn=lambda memory: (
        [(GetAttrKey(name), child) for name, child in zip(_CHILDREN, _flatten(memory)[0], strict=False)],
        _flatten(memory)[1],
    ),
)


class VisualMemory(nn.Module):
    """The projectors and the positions: everything that trains beside the vision adapters.

    Args:
        config: the adapter's shape and constants.
        width: d, the language model's hidden size.
        layers: how many layers have memory; their number of position pairs unless positions are shared.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        config: MemVPConfig,
        *,
        width: int,
        layers: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(config.vision_dim, config.projector_dim, width, dtype=dtype, device=device)
        self.class_projector = (
            Projector(config.vision_dim, config.projector_dim, width, dtype=dtype, device=device)
            if config.class_token
            else None
        )
        shape = (config.num_slots, width) if config.shared_positions else (layers, config.num_slots, width)
        self.key_position = nn.Parameter(_POSITION_STD * torch.randn(shape, dtype=dtype, device=device))
        self.value_position = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        self.dropout = nn.Dropout(
            config.dropout
        )  # never called; a module, so that tools which turn dropout off find it

    def encode(self, features: Tensor, valid: Tensor) -> Tensor:
        """An image's core: its factor rows, then zero rows up to M; before them the class token's, where there is one.

        Args:
            features: (R, n, vision_dim), n ≤ M; with a class token, its row and n others.
            valid: (R, n) bool, False on padding.

        Returns:
            (R, M, r), or (R, 1 + M, r) with a class token.
        """
        if self.class_projector is None:
            return self._padded(self.projector.factors(features, valid))
        token = self.class_projector.factors(features[:, :1], valid[:, :1])
        return torch.cat([token, self._padded(self.projector.factors(features[:, 1:], valid[:, 1:]))], dim=1)

    def _padded(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, self.config.num_slots - rows.shape[1]))

    def forward(
        self, features: Tensor | None = None, valid: Tensor | None = None, core: Tensor | None = None
    ) -> Memory:
        """The memory of a batch from its features, or from cores that :meth:`encode` made earlier."""
        if core is None:
            assert features is not None and valid is not None
            core = self.encode(features, valid)
        config, class_token = self.config, None
        if self.class_projector is not None:
            first, core = core[:, :1], core[:, 1:]
            present = first[:, 0, config.projector_dim] != 0  # the factor of the bias
            class_token = ClassToken(first, first[:, 0] @ self.class_projector.basis(), present)
        key_position: Tensor = self.key_position
        value_position: Tensor = self.value_position
        if type(self) is not VisualMemory:  # fully_shard(memory) frees what it gathered as soon as this returns
            key_position, value_position = key_position.clone(), value_position.clone()
        return Memory(
            core=core,
            basis=self.projector.basis() * config.feature_scale,
            key_position=key_position,
            value_position=value_position,
            scale=config.memory_scale,
            dropout=self.dropout.p if self.training else 0.0,
            visual_activation=config.visual_activation,
            visual_map=config.visual_map,
            visual_drop=config.visual_drop,
            class_token=class_token,
        )
