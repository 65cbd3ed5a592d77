"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for the operator: the matrix products of the torch backend.

The formulas run it on meta tensors, in a form in which every row of x reads one memory row; which one makes no difference to the
count. Imported on first use, because PyTorch's counter imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from memvp_kernels.autograd import run_backward, run_forward
from memvp_kernels.checks import INTEGERS, Options

__all__ = ["IN_PLACE", "backward", "count", "forward"]

#: PyTorch counts the out-of-place forms only.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda total, a, b, out_shape=None, **_: flop_counter.addmm_flop(total, a, b),
    torch.ops.aten.baddbmm_: lambda total, a, b, out_shape=None, **_: flop_counter.baddbmm_flop(total, a, b),
}


def count(formulas: dict[Any, Callable[..., int]]) -> None:
    """Give the counters that are active, and those to come, the formulas of these ops."""
    for op, formula in formulas.items():
        flop_counter.flop_registry.setdefault(op, formula)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, flop_counter._FlopCounterMode):
                mode.counter.flop_registry.setdefault(op, formula)


def forward(tensors: dict[str, Tensor | None], options: Options, keep: int, training: bool) -> int:
    """Of one forward; arguments as `run_forward`."""
    with _counter() as counter:
        run_forward(_on_meta(tensors), _torch(options), keep, training)
    return counter.get_total_flops()


def backward(grad: Tensor, tensors: dict[str, Tensor | None], options: Options, wanted: list[str]) -> int:
    """Of one backward; arguments as `run_backward`."""
    with _counter() as counter:
        run_backward(_meta(grad), _on_meta(tensors), _torch(options), wanted)
    return counter.get_total_flops()


def _counter() -> flop_counter.FlopCounterMode:
    return flop_counter.FlopCounterMode(display=False, custom_mapping=IN_PLACE)


def _torch(options: Options) -> Options:
    return options._replace(backend="torch")


def _meta(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _on_meta(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor | None] = {}
    for name, t in tensors.items():
        found[name] = None
        if t is not None and name not in INTEGERS:
            of_memory = name in ("visual_key", "visual_value", "memory") and t.dim() == 3
            found[name] = copies.setdefault(id(t), _meta(t[:1] if of_memory else t))
    return found
