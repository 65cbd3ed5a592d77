"""Counts what a process sends: every collective that passes PyTorch's dispatcher, with the bytes of its whole tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Traffic"]

# operator → (kind, which tensor is the whole one: "in" the argument or "out" the result)
_COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", "in"),
    "c10d::_allgather_base_": ("all-gather", "in"),
    "c10d::allgather_": ("all-gather", "in"),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", "out"),
    "_c10d_functional::all_reduce": ("all-reduce", "in"),
    "_c10d_functional::all_reduce_": ("all-reduce", "in"),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", "out"),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", "in"),
}


class Traffic(TorchDispatchMode):
    """Within it, collectives are counted.

    Attributes:
        bytes: (kind, bytes of the whole tensor) → how often.
        unknown: collectives that this class does not know how to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in _COLLECTIVES:
            kind, where = _COLLECTIVES[name]
            self.bytes[kind, _bytes(args[0] if where == "in" else out)] += 1
        elif name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            self.unknown.add(name)
        return out


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(_bytes(v) for v in value)
    return 0
