"""The adapters that MemVP trains inside CLIP, and the vision model of one MemVPModel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # quantize_ passes over it

from memvp_kernels.models.memory.vision_tower import tower
from memvp_kernels.models.offloading import fetch
from memvp_kernels.models.patching.attach import uses_peft
from memvp_kernels.models.patching.patch import Patch, is_patched, patch, unpatch

__all__ = [
    "ADAPTER_DIM",
    "ClipAdapter",
    "VisionTower",
    "adapter_settings",
    "adapters",
    "attach_adapters",
    "detach_adapters",
]

ADAPTER_DIM = 12
"""Inner width of the official CLIP adapters."""


class ClipAdapter(nn.Module):
    """fc2(dropout(gelu(fc1(h)))), no biases, beside a CLIP block's MLP; zero until trained, because fc2 is.

    Args:
        width: of the vision model.
        hidden_dim: inner width.
        dropout: of the inner activations, in training.
        dtype: of the parameters, which may be wider than the vision model's.
        device: of the parameters.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int = ADAPTER_DIM,
        *,
        dropout: float = 0.1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = NonDynamicallyQuantizableLinear(width, hidden_dim, bias=False, dtype=dtype, device=device)
        self.fc2 = NonDynamicallyQuantizableLinear(hidden_dim, width, bias=False, dtype=dtype, device=device)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(…, width) to (…, width), computed in h's dtype."""
        inner = self.dropout(F.gelu(F.linear(h, self.fc1.weight.to(h.dtype))))
        return F.linear(inner, self.fc2.weight.to(h.dtype))


class _AdaptedMLP(Patch):
    """In front of a CLIP block's MLP: mlp(h) + scale · adapter(h). The block adds the residual, h being its ln_2 x."""

    adapter_mlp: ClipAdapter
    adapter_scale: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, tokens, width) to (B, tokens, width)."""
        own: Tensor = super().forward(hidden_states)
        return own + self.adapter_scale * self.adapter_mlp(hidden_states)


class VisionTower:
    """A MemVPModel's vision model: what of it trains, the adapters that loading gave it, and the way back.

    Args:
        module: a transformers CLIPVisionModel, or a model that holds one as ``vision_model``.

    Raises:
        TypeError: ``module`` is not a CLIP vision model.
    """

    def __init__(self, module: nn.Module) -> None:
        tower(module)
        self.module = module
        self._trained_before: dict[str, bool] = {}
        self._gave_adapters = False

    def freeze(self) -> None:
        """Freeze all but the adapters, which train. Where PEFT has decided what trains, only the block that is never run."""
        self._trained_before = {name: p.requires_grad for name, p in self.module.named_parameters()}
        frozen = tower(self.module).encoder.layers[-1] if uses_peft(self.module) else self.module
        frozen.requires_grad_(False)
        for adapter in adapters(self.module):
            adapter.requires_grad_(True)

    def restore(self) -> None:
        """Undo :meth:`freeze` and :meth:`give_adapters`. Parameters that came later keep their flags."""
        self.drop_adapters()
        for name, parameter in self.module.named_parameters():
            if name in self._trained_before:
                parameter.requires_grad_(self._trained_before[name])

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that train, by name."""
        self.fetch_adapters()
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def fetch_adapters(self) -> None:
        """Take the adapters out of offloading, which does not reach weights that are read without their layer's forward."""
        for adapter in adapters(self.module):
            fetch(adapter)

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of ``names`` that it has, trainable or not."""
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in names if name in own}

    def train(self, names: Iterable[str]) -> None:
        """Let the parameters of these names train, until :meth:`restore`."""
        for name in names:
            self.module.get_parameter(name).requires_grad_(True)

    def give_adapters(self, **settings: Any) -> list[ClipAdapter]:
        """:func:`attach_adapters`, until :meth:`restore`."""
        given = attach_adapters(self.module, **settings)
        self._gave_adapters = True
        return given

    def drop_adapters(self) -> None:
        """Detach what :meth:`give_adapters` attached, if it did."""
        if self._gave_adapters:
            detach_adapters(self.module)
            self._gave_adapters = False


def attach_adapters(
    vision_model: nn.Module, *, hidden_dim: int = ADAPTER_DIM, scale: float = 0.1, dropout: float = 0.1
) -> list[ClipAdapter]:
    """Give every block that :func:`~.vision_tower.encode` runs an adapter; this instance only, its parameters keep their names.

    The output is unchanged until the adapters are trained. The adapters are trainable, float32 and new: call
    :func:`detach_adapters` first to start over.

    Args:
        vision_model: a transformers CLIPVisionModel, or a model that holds one as ``vision_model``.
        hidden_dim: inner width (official: 12).
        scale: multiplies the adapter's output (official: 0.1).
        dropout: of the inner activations, in training (official: 0.1).

    Returns:
        The adapters in the order of the blocks. The last block, which is never run, gets none.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
        ValueError: it has adapters already.
    """
    if adapters(vision_model):
        raise ValueError("vision_model has adapters already: detach_adapters(vision_model) takes them off")
    for mlp in _mlps(vision_model):
        weight = mlp.fc1.weight
        adapter = ClipAdapter(mlp.fc1.in_features, hidden_dim, dropout=dropout, device=weight.device)
        patch(mlp, _AdaptedMLP)
        mlp.adapter_mlp = adapter.train(mlp.training)
        mlp.adapter_scale = scale
    return adapters(vision_model)


def detach_adapters(vision_model: nn.Module) -> None:
    """Undo :func:`attach_adapters`: same modules, same state_dict keys, same output. Without adapters, do nothing.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
    """
    for mlp in _mlps(vision_model):
        if _is_adapted(mlp):
            unpatch(mlp)
            del mlp.adapter_mlp, mlp.adapter_scale


def adapters(vision_model: nn.Module) -> list[ClipAdapter]:
    """The adapters in the order of the blocks; empty when there are none.

    Raises:
        TypeError: ``vision_model`` is not a CLIP vision tower.
    """
    return [mlp.adapter_mlp for mlp in _mlps(vision_model) if _is_adapted(mlp)]


def adapter_settings(vision_model: nn.Module) -> dict[str, float] | None:
    """What :func:`attach_adapters` was called with, scale and dropout; None when there are no adapters."""
    adapted = [mlp for mlp in _mlps(vision_model) if _is_adapted(mlp)]
    if not adapted:
        return None
    return {"dropout": adapted[0].adapter_mlp.dropout.p, "scale": float(adapted[0].adapter_scale)}


def _is_adapted(mlp: nn.Module) -> bool:
    return is_patched(mlp) and isinstance(mlp, _AdaptedMLP)


def _mlps(vision_model: nn.Module) -> list[Any]:
    return [layer.mlp for layer in tower(vision_model).encoder.layers[:-1]]
