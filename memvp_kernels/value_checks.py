"""Checks of integer tensors' values, read only where that needs no synchronization."""

from __future__ import annotations

import os

import torch

from memvp_kernels.checks import INTEGERS, Tensors

__all__ = ["check_values"]


def check_values(tensors: Tensors) -> None:
    """Ranges of the integer tensors: on a CPU always, on a GPU (where it synchronizes) only under ``MEMVP_CHECK=1``.

    They are read as they were given, so an offset of a text-only call or an index into an empty memory is judged too.

    Raises:
        ValueError: an index, a length or an offset out of range.
    """
    x, key = tensors["x"], tensors["visual_key"]
    if all(tensors[name] is None for name in INTEGERS):
        return
    assert x is not None
    kind = x.device.type
    if kind == "meta" or (kind != "cpu" and os.environ.get("MEMVP_CHECK") != "1"):
        return
    if key is not None:
        memories, slots = key.shape[0] if key.dim() == 3 else 1, key.shape[-2]
        for name, low, high, way_out in (
            ("visual_index", -1, memories - 1, "-1 means no memory"),
            ("visual_lengths", 0, slots, "it counts valid slots of a memory row"),
        ):
            t = tensors[name]
            if t is not None and t.numel():
                least, most = (int(v) for v in torch.aminmax(t))
                if least < low or most > high:
                    raise ValueError(f"{name}: wanted values in {low}..{high}, got {least}..{most}; {way_out}")
    cu_seqlens = tensors["cu_seqlens"]
    if cu_seqlens is not None:
        offsets, rows = [int(c) for c in cu_seqlens.tolist()], x.shape[0]
        if offsets[0] != 0 or offsets[-1] != rows or any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
            shown = str(offsets) if len(offsets) <= 12 else f"{offsets[:6]} … {offsets[-3:]}"
            raise ValueError(
                f"cu_seqlens: wanted offsets rising from 0 to N = {rows}, got {shown}; sequence i is x[cu[i]:cu[i+1]]"
            )
