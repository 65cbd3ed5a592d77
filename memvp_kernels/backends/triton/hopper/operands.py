"""The host's side of a Gluon launch: which operands the kernels take, and the descriptors that Gluon wants of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from memvp_kernels.backends.triton import launch
from memvp_kernels.backends.triton.hopper.ring import SWIZZLED, SWIZZLED_BOX
from memvp_kernels.backends.triton.operands import BY_POINTER, BY_ROW

__all__ = ["describe", "programs", "takes"]

_ARCHITECTURE = 90  # wgmma is Hopper's alone
_DTYPES = (torch.float16, torch.bfloat16)
_LINE = 8  # 16-bit numbers in 16 bytes


def takes(
    like: Tensor, lefts: Iterable[Tensor | None], weights: Iterable[Tensor | None], results: Iterable[int]
) -> bool:
    """Whether the Gluon kernels can run a step with these operands, or without those that are None; otherwise its fused twin does.

    Args:
        like: x, or what has its dtype and device.
        lefts: operands that are read row by row: TMA must be able to.
        weights: matrices that may lie either way round.
        results: columns of results (N, ·) that are contiguous; every row must begin at a multiple of 16 bytes.
    """
    rows, either = [t for t in lefts if t is not None], [w for w in weights if w is not None]
    return (
        like.dtype in _DTYPES
        and launch.architecture(like.device) == _ARCHITECTURE
        and all(columns % _LINE == 0 for columns in results)
        and all(t.dtype == like.dtype for t in (*rows, *either))
        and all(launch.describable(t) for t in rows)
        and all(launch.form_of(w) != BY_POINTER.value for w in either)
    )


def describe(tensor: Tensor | None, block: tuple[int, ...], form: int = BY_ROW.value) -> TensorDescriptor | None:
    """As `launch.describe`, in the swizzle of the ring; None for what is absent."""
    if tensor is None:
        return None
    layout = (SWIZZLED if len(block) == 2 else SWIZZLED_BOX).value
    made = TensorDescriptor.__new__(TensorDescriptor)
    vars(made).update(vars(launch.describe(tensor, block, form)), layout=layout)
    return made


def programs(like: Tensor, tiles: int) -> tuple[int]:
    """The grid: one program for each multiprocessor, which it fills, or for each tile where those are fewer."""
    return (min(tiles, launch.chip(like.device).multiprocessors),)
