"""Named problems that every backend is tested on: odd sizes, every form of memory, every way to say who reads what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.tolerance import FLOATING

Arguments = dict[str, Any]

#: Where a test marked `device` has its tensors.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(a: Arguments, device: torch.device = DEVICE) -> Arguments:
    """The arguments on the device, with their strides, and one tensor still one where it was passed twice."""
    copies: dict[int, Tensor] = {}

    def move(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)
        return copies[id(t)]

    return {n: move(t) if isinstance(t, Tensor) and t.device != device else t for n, t in a.items()}


def random(*shape: int, dtype: torch.dtype, scale: float = 0.5) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def ffn(
    dtype: torch.dtype,
    *,
    S: int = 3,
    T: int = 5,
    d: int = 24,
    F: int = 40,
    gated: bool = True,
    biased: bool = False,
    transposed: bool = True,
    alone: bool = False,
) -> Arguments:
    """x and the FFN's own weights; `transposed`: value is a view of down_proj.weight, `alone`: no FFN here."""
    a: Arguments = {"x": random(S, T, d, dtype=dtype), "key": None, "value": None}
    if alone:
        return a
    a["key"] = random(F, d, dtype=dtype)
    a["value"] = random(d, F, dtype=dtype).T if transposed else random(F, d, dtype=dtype)
    if gated:
        a["gate"] = random(F, d, dtype=dtype)
    if biased:
        a.update(key_bias=random(F, dtype=dtype), value_bias=random(d, dtype=dtype))
        if gated:
            a["gate_bias"] = random(F, dtype=dtype)
    return a


def memory(
    a: Arguments,
    *,
    R: int | None,
    M: int = 7,
    r: int | None = None,
    positions: bool = True,
    same: bool = False,
    wide: bool = False,
) -> Arguments:
    """Adds a memory; R None: one (M, ·) for all; r: factored; same: one tensor is key and value; wide: float32 under x's dtype."""
    dtype = torch.promote_types(a["x"].dtype, torch.float32) if wide else a["x"].dtype
    d = a["x"].shape[-1]
    shape = (M, r or d) if R is None else (R, M, r or d)
    a["visual_key"] = random(*shape, dtype=dtype)
    a["visual_value"] = a["visual_key"] if same else random(*shape, dtype=dtype)
    if r is not None:
        a["visual_basis"] = random(r, d, dtype=dtype)
    if positions:
        a.update(key_position=random(M, d, dtype=dtype), value_position=random(M, d, dtype=dtype))
    return a


def packed(a: Arguments, lengths: list[int]) -> Arguments:
    """x as rows of sequences of these lengths."""
    a["x"] = random(sum(lengths), a["x"].shape[-1], dtype=a["x"].dtype)
    a["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return a


def _index(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _lengths(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32)


_FORMS: dict[str, dict[str, Any]] = {"plain": {}, "factored": {"r": 9}}

_SHARING: dict[str, Callable[[torch.dtype, dict[str, Any]], Arguments]] = {
    "one_each": lambda t, f: memory(ffn(t), R=3, **f),
    "shared_by_all": lambda t, f: memory(ffn(t), R=None, **f),
    "index": lambda t, f: dict(memory(ffn(t, S=4), R=3, **f), visual_index=_index(2, -1, 2, 0)),
    "lengths": lambda t, f: dict(memory(ffn(t), R=3, **f), visual_lengths=_lengths(0, 7, 4)),
    "shared_lengths": lambda t, f: dict(memory(ffn(t), R=None, **f), visual_lengths=_lengths(4)),
    "packed": lambda t, f: memory(packed(ffn(t), [4, 0, 11, 2]), R=4, **f),
    "packed_index_lengths": lambda t, f: dict(
        memory(packed(ffn(t), [4, 0, 11, 2, 3]), R=3, **f),
        visual_index=_index(1, 0, 1, -1, 2),
        visual_lengths=_lengths(7, 5, 0),
    ),
    "no_positions": lambda t, f: memory(ffn(t), R=3, positions=False, **f),
    "same_tensor": lambda t, f: memory(ffn(t), R=3, same=True, **f),
    "wide": lambda t, f: memory(ffn(t), R=3, wide=True, **f),
    "alone": lambda t, f: memory(ffn(t, alone=True), R=3, **f),
    "alone_residual": lambda t, f: dict(memory(ffn(t, alone=True), R=3, **f), residual=random(3, 5, 24, dtype=t)),
    "plain_ffn_biased": lambda t, f: memory(ffn(t, gated=False, biased=True), R=3, **f),
    "gated_biased_residual": lambda t, f: dict(
        memory(ffn(t, biased=True), R=3, **f), residual=random(3, 5, 24, dtype=t)
    ),
    "scaled": lambda t, f: dict(memory(ffn(t), R=3, **f), visual_scale=0.1),
    "one_slot": lambda t, f: memory(ffn(t), R=3, M=1, **f),
    "one_token": lambda t, f: memory(ffn(t, S=5, T=1), R=5, **f),
    "odd_sizes": lambda t, f: memory(ffn(t, S=2, T=7, d=37, F=53), R=2, M=17, **f),
    "contiguous_value": lambda t, f: memory(ffn(t, transposed=False), R=3, **f),
}

_WITHOUT: dict[str, Callable[[torch.dtype], Arguments]] = {
    "text_only": lambda t: ffn(t),
    "text_only_plain": lambda t: ffn(t, gated=False),
    "text_only_biased": lambda t: ffn(t, biased=True),
    "any_leading_shape": lambda t: dict(ffn(t), x=random(2, 3, 2, 24, dtype=t)),
    "vector": lambda t: dict(ffn(t), x=random(24, dtype=t)),
    "vector_shared_memory": lambda t: memory(dict(ffn(t), x=random(24, dtype=t)), R=None),
    "relu": lambda t: dict(memory(ffn(t, gated=False), R=3), activation="relu"),
    "gelu": lambda t: dict(memory(ffn(t), R=3), activation="gelu"),
    "gelu_tanh": lambda t: dict(memory(ffn(t), R=3), activation="gelu_tanh"),
    "two_activations": lambda t: dict(memory(ffn(t, gated=False), R=3), activation="relu", visual_activation="gelu"),
    "no_slots": lambda t: memory(ffn(t), R=3, M=0),
    "no_slots_factored": lambda t: memory(ffn(t), R=3, M=0, r=4),
    "no_tokens": lambda t: memory(ffn(t, T=0), R=3),
    "no_sequences": lambda t: memory(ffn(t, S=0), R=0),
    "nobody_has_memory": lambda t: dict(memory(ffn(t), R=2), visual_index=_index(-1, -1, -1)),
}


def names() -> list[str]:
    return [f"{sharing}-{form}" for sharing in _SHARING for form in _FORMS] + list(_WITHOUT)


def build(name: str, dtype: torch.dtype, device: torch.device | None = None) -> Arguments:
    """The arguments of the case, fresh, in `dtype`; the same numbers on every device."""
    if name in _WITHOUT:
        a = _WITHOUT[name](dtype)
    else:
        sharing, form = name.rsplit("-", 1)
        a = _SHARING[sharing](dtype, _FORMS[form])
    return a if device is None else moved(a, device)


#: Cases with the rows of x, by the first dimension, that read no slot: no image, or one of length 0.
IDLE = {
    f"{sharing}-{form}": rows
    for sharing, rows in {
        "index": slice(1, 2),
        "lengths": slice(0, 1),
        "packed_index_lengths": slice(15, 20),
    }.items()
    for form in _FORMS
}


def strided(a: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The same numbers in other layouts: a transposed weight, every second column, x with its axes swapped."""
    for name in ("x", "key", "gate", "visual_key", "key_position"):
        t = a.get(name)
        if t is None:
            continue
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        yield f"{name}_every_second", dict(a, **{name: wide[..., ::2]})
        yield f"{name}_transposed", dict(a, **{name: t.transpose(-1, -2).contiguous().transpose(-1, -2)})


#: One case for each way that the registered op and autograd treat differently.
FORMS = [
    "one_each-plain",
    "index-plain",
    "index-factored",
    "packed_index_lengths-factored",
    "gated_biased_residual-plain",
    "text_only_plain",
]


def leaves(a: dict[str, Any], *names: str) -> dict[str, Any]:
    chosen = names or tuple(n for n in FLOATING if a.get(n) is not None)
    return {n: v.detach().clone().requires_grad_() if n in chosen else v for n, v in a.items()}
