"""Inputs for the decode kernels: shapes that reach every path, odd sizes, and each argument of the contract."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.csrc.emulate_decode import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(
    *,
    tokens: int = 3,
    width: int = 72,
    pairs: int | None = 40,
    slots: int = 0,
    images: int = 2,
    rank: int | None = None,
    dtype: torch.dtype = BF16,
    memory_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    gated: bool = True,
    bias: bool = False,
    positions: bool = False,
    lengths: list[int] | None = None,
    index: list[int] | None = None,
    cu_seqlens: list[int] | None = None,
    shared: bool = False,
    residual: bool = False,
    value_contiguous: bool = False,
    misaligned: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `reference.ffn`. By default tokens are one per sequence, and sequence s reads image s % images."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        t = torch.randn(*shape, generator=g) * scale
        if not misaligned:
            return t.to(dtype)
        return torch.cat([torch.zeros(1), t.flatten()]).to(dtype)[1:].view(shape)  # off the 16 bytes by one element

    memory = memory_dtype or dtype
    a: dict[str, Any] = dict(options)
    a["x"] = random(tokens, width) if cu_seqlens is not None or shared or slots == 0 else random(tokens, 1, width)
    if pairs is not None:
        a["key"] = random(pairs, width, scale=width**-0.5)
        down = max(pairs, 1) ** -0.5
        a["value"] = random(pairs, width, scale=down) if value_contiguous else random(width, pairs, scale=down).T
        if gated:
            a["gate"] = random(pairs, width, scale=width**-0.5)
        if bias:
            kind = bias_dtype or dtype
            a["key_bias"], a["value_bias"] = random(pairs, dtype=kind), random(width, dtype=kind)
            if gated:
                a["gate_bias"] = random(pairs, dtype=kind)
    if slots:
        shape = (slots, width if rank is None else rank) if shared else (images, slots, width if rank is None else rank)
        scale = width**-0.5 if rank is None else 1.0
        a["visual_key"], a["visual_value"] = (random(*shape, scale=scale, dtype=memory) for _ in range(2))
        if rank is not None:
            a["visual_basis"] = random(rank, width, scale=(width * rank) ** -0.5, dtype=memory)
        if positions:
            a["key_position"], a["value_position"] = (
                random(slots, width, scale=0.3 * width**-0.5, dtype=memory) for _ in range(2)
            )
        if not shared:
            sequences = tokens if cu_seqlens is None else len(cu_seqlens) - 1
            a["visual_index"] = torch.tensor([s % images for s in range(sequences)] if index is None else index)
        if cu_seqlens is not None:
            a["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        if lengths is not None:
            a["visual_lengths"] = torch.tensor(lengths)
    if residual:
        a["residual"] = random(*a["x"].shape)
    return a


# One case for every argument and path: (name, make's arguments). Kept small: the sanitizers and the mutations run them all.
SMALL: dict[str, dict[str, Any]] = {
    "text_gated": {"tokens": 3, "residual": True},
    "text_plain_biased": {"tokens": 2, "gated": False, "bias": True, "bias_dtype": FP32, "activation": "gelu"},
    "long_rows": {"tokens": 1, "width": 584, "pairs": 392},
    "many_pairs": {"tokens": 9, "width": 328, "pairs": 456, "gated": False, "activation": "relu"},
    "materialised": {"tokens": 5, "slots": 35, "images": 3, "positions": True, "lengths": [35, 17, 0], "index": [0, -1, 1, 0, 2], "visual_scale": 0.7},
    "materialised_one_image": {"tokens": 19, "width": 64, "pairs": 16, "slots": 17, "images": 1, "positions": True, "shared": True},
    "materialised_wide_memory": {"tokens": 2, "slots": 20, "images": 2, "positions": True, "memory_dtype": FP32, "visual_activation": "relu"},
    "factored": {"tokens": 5, "slots": 35, "images": 3, "rank": 24, "positions": True, "lengths": [35, 17, 0], "index": [0, -1, 1, 0, 2], "visual_scale": 0.7},
    "factored_wide_rank": {"tokens": 3, "width": 136, "slots": 150, "images": 2, "rank": 136, "positions": True, "residual": True},
    "factored_wide_memory": {"tokens": 2, "slots": 20, "images": 2, "rank": 8, "memory_dtype": FP32},
    "factored_packed": {"tokens": 11, "slots": 18, "images": 3, "rank": 16, "positions": True, "cu_seqlens": [0, 3, 3, 10], "index": [2, 0, 2]},
    "visual_alone": {"tokens": 2, "pairs": None, "slots": 18, "rank": 16, "positions": True, "residual": True},
    "value_contiguous": {"tokens": 10, "width": 136, "pairs": 264, "value_contiguous": True, "slots": 18, "rank": 8},
    "odd_text": {"tokens": 3, "width": 37, "pairs": 21, "bias": True, "bias_dtype": FP32, "residual": True},
    "odd_plain": {"tokens": 9, "width": 35, "pairs": 23, "gated": False, "activation": "gelu_tanh", "value_contiguous": True},
    "odd_materialised": {"tokens": 3, "width": 37, "pairs": 21, "slots": 19, "positions": True, "lengths": [19, 5]},
    "odd_factored": {"tokens": 3, "width": 37, "pairs": 21, "slots": 19, "rank": 13, "positions": True, "lengths": [19, 5], "memory_dtype": FP32},
    "misaligned": {"tokens": 2, "slots": 18, "rank": 16, "positions": True, "misaligned": True},
    "half": {"tokens": 5, "slots": 18, "rank": 16, "positions": True, "dtype": FP16, "bias": True},
    "half_materialised_odd": {"tokens": 3, "width": 37, "pairs": 21, "slots": 18, "positions": True, "dtype": FP16},
    "across_many": {"tokens": 40, "width": 200, "pairs": 136, "value_contiguous": True, "gated": False},
    "stages_wrap": {"tokens": 3, "width": 1024, "pairs": 264, "slots": 20, "rank": 24, "positions": True, "multiprocessors": 12},
    "images_wrap": {"tokens": 4, "width": 520, "pairs": 16, "slots": 330, "images": 2, "positions": True, "lengths": [330, 290], "index": [0, 1, 1, -1]},
    "images_without_positions": {"tokens": 10, "width": 264, "pairs": None, "slots": 37, "images": 1, "lengths": [36]},
    "tokens_64": {"tokens": 64, "width": 136, "pairs": 72, "slots": 18, "images": 5, "rank": 16, "positions": True},
    "split_k": {"tokens": 33, "width": 136, "pairs": 520, "multiprocessors": 12},
    "tokens_30": {"tokens": 30, "width": 136, "pairs": 264, "slots": 18, "images": 30, "rank": 16, "positions": True, "shared_bytes": 100 << 10},
}  # fmt: skip


def small(name: str, *, form: str = "auto") -> Case:
    """The case of that name; on three multiprocessors of a large chip where it does not say otherwise."""
    sizes = dict(SMALL[name])
    chip = {"multiprocessors": 3} | {n: sizes.pop(n) for n in ("multiprocessors", "shared_bytes") if n in sizes}
    return Case(make(**sizes), form=form, **chip)


# The product of the sizes that decide tails: everything once more, run under `slow`.
SWEEP = [
    {
        "tokens": n,
        "width": d,
        "pairs": f,
        "slots": m,
        "rank": r,
        "gated": (n + d) % 2 == 0,
        "positions": True,
        "residual": n % 3 == 0,
        "value_contiguous": (n + m) % 3 == 0,
        "seed": n + d + f + m,
    }
    for n, (d, f), (m, r) in itertools.product(
        (1, 2, 7, 8, 9, 16, 17, 33, 64),
        ((8, 8), (9, 37), (24, 31), (40, 64), (264, 136), (136, 520), (301, 267)),
        ((0, None), (1, None), (17, None), (1, 8), (17, 8), (40, 13)),
    )
]
