"""Three FFNs over one factored memory, through the operator itself or through a shared memory: on one x and added up, or one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.shared_memory import SharedMemory, fused_ffn_shared
from tests import cases, tolerance

LAYERS = 3
MEMORY = ("core", "basis", "key_position", "value_position")
_FFN = ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")
Arguments = dict[str, Any]


def arguments(
    dtype: torch.dtype,
    *,
    index: bool = False,
    alone: bool = False,
    gated: bool = True,
    M: int = 7,
    R: int = 3,
    **method: Any,
) -> Arguments:
    """x, the layers' weights as key0, key1, …, the memory (float32 under a half-precision x), who reads which row, and the scalars of a relative."""
    a: Arguments = dict(method)
    for layer in range(LAYERS):
        weights = cases.ffn(dtype, S=4 if index else R, T=15, gated=gated, alone=alone)
        a.setdefault("x", weights.pop("x"))
        a |= {
            f"{name}{layer}": 0.3 * t for name, t in weights.items() if t is not None
        }  # so that depth does not overflow
    wide = torch.promote_types(dtype, torch.float32)
    sizes = {"core": (R, M, 9), "basis": (9, 24), "key_position": (M, 24), "value_position": (M, 24)}
    a |= {name: cases.random(*size, dtype=wide) for name, size in sizes.items()}
    if index:
        a["visual_index"] = torch.tensor([2, -1, 2, 0])
    return a


def trained(a: Arguments) -> list[str]:
    """What MemVP trains, and x."""
    return [name for name in ("x", *MEMORY) if a[name].numel()]


def _weights(a: Arguments, layer: int) -> dict[str, Tensor | None]:
    return {name: a.get(f"{name}{layer}") for name in _FFN}


def through(ffn: Callable[..., Tensor], **a: Any) -> Tensor:
    """Added up, with the memory's parts handed to `ffn`, a function with the operator's arguments, in every layer."""
    y: Tensor | None = None
    for layer in range(LAYERS):
        y = single(ffn, a, layer, residual=y)
    assert y is not None
    return y


def single(ffn: Callable[..., Tensor], a: Arguments, layer: int, **more: Any) -> Tensor:
    """One layer by `ffn`, a function with the operator's arguments."""
    return ffn(
        x=a["x"], visual_key=a["core"], visual_value=a["core"], visual_basis=a["basis"], key_position=a["key_position"],
        value_position=a["value_position"], visual_index=a.get("visual_index"), visual_scale=0.7, **_weights(a, layer), **more,
        **{name: a[name] for name in ("visual_activation", "visual_map", "visual_drop") if name in a},
    )  # fmt: skip


def memory(a: Arguments) -> SharedMemory:
    """The memory of `a`, as one forward makes it."""
    options = {name: a[name] for name in ("visual_map", "materialize") if name in a}
    return SharedMemory(*(a[name] for name in MEMORY), a["x"].dtype, **options)


def shared(a: Arguments, **options: Any) -> Tensor:
    """Added up, over one `SharedMemory`."""
    one, y = memory(a), None
    for layer in range(LAYERS):
        y = call(a, a["x"], one, layer, residual=y, **options)
    one.close()
    assert y is not None
    return y


def check(a: Arguments, **options: Any) -> None:
    """:func:`shared` and the gradients of what MemVP trains, by the rule of tests/tolerance.py."""
    tolerance.check(lambda **b: shared(b, **options), a, names=trained(a), through=through)


def deep(a: Arguments, one: SharedMemory, first: int = 0) -> Tensor:
    """One after the other from layer `first` on, over one `SharedMemory` that is left open."""
    x = a["x"]
    for layer in range(first, LAYERS):
        x = call(a, x, one, layer)
    return x


def call(
    a: Arguments,
    x: Tensor,
    one: SharedMemory,
    layer: int,
    caller: int | None = None,
    *,
    residual: Tensor | None = None,
    recompute: bool = False,
    backend: str = "torch",
) -> Tensor:
    """One FFN, in its own place or as another caller."""
    return fused_ffn_shared(
        x, _weights(a, layer), one, layer if caller is None else caller,
        visual_index=a.get("visual_index"), residual=residual, activation="silu", visual_scale=0.7, dropout_p=0.0,
        recompute=recompute, backend=backend, visual_activation=a.get("visual_activation"), visual_drop=a.get("visual_drop", 0.0),
    )  # fmt: skip
