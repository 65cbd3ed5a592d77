"""The relatives of MemVP on the operator: their arguments, and problems in which rounding can't change which scores are dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels import reference
from tests import cases, tolerance
from tests.cases import Arguments

METHODS: dict[str, dict[str, Any]] = {
    "memvp": {},
    "memvr": {"visual_activation": "identity"},
    "mapped": {"visual_map": "silu"},
    "dropped": {"visual_drop": 0.3},
    "adem": {"visual_activation": "identity", "visual_map": "silu", "visual_drop": 0.45},
}


def build(name: str, method: str, dtype: torch.dtype, device: torch.device | None = None) -> Arguments:
    """The case under a method."""
    a = cases.build(name, dtype) | METHODS[method]
    if "visual_drop" in a:
        separate(a)
    return a if device is None else cases.moved(a, device)


def separate(a: Arguments) -> None:
    """Draw rows of x again until none has two scores so close to its threshold that rounding could put either below the other."""
    x, rows = a["x"], a["x"].reshape(-1, a["x"].shape[-1])
    for _ in range(200):
        close = _close(a)
        if not close.any():
            return
        rows[close] = cases.random(int(close.sum()), x.shape[-1], dtype=x.dtype)
        a["x"] = rows.view_as(x)
    raise AssertionError("no x keeps its scores apart; take fewer slots")


def _close(a: Arguments) -> Tensor:
    """(N,) bool: the scores on the two sides of the threshold are closer than a dozen roundings of the terms of their sums."""
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in a.items()}
    x, drop = wide["x"], a.get("visual_drop", 0.0)
    rows = x.reshape(-1, x.shape[-1])
    act = F.silu if a.get("visual_map") else torch.nn.Identity()
    close = torch.zeros(len(rows), dtype=torch.bool)
    spans = reference.sequences(x, wide["visual_key"], a.get("visual_index"), a.get("cu_seqlens"))
    for first, end, row in spans:
        if row < 0 or end == first:
            continue
        key, position, size = wide["visual_key"], wide.get("key_position"), 1.0
        key = key if key.dim() == 2 else key[row]
        if wide.get("visual_basis") is not None:
            size = key.norm(dim=1).max() * wide["visual_basis"].norm()
            key = key @ wide["visual_basis"]
        key = key if position is None else key + position
        slots = len(key) if a.get("visual_lengths") is None else int(a["visual_lengths"][row])
        dropped = int(drop * slots)
        if not dropped:
            continue
        key, query = act(key[:slots]), act(rows[first:end])
        terms = query.norm(dim=1) * max(key.norm(dim=1).max(), size if a.get("visual_map") is None else 0.0)
        scores = (query @ key.T).sort(dim=1).values
        # A key and a map are rounded to half a unit each, sums in float32 hardly, a product with a basis and the score itself as well.
        close[first:end] = scores[:, dropped] - scores[:, dropped - 1] < 4 * torch.finfo(a["x"].dtype).eps * terms
    return close


def check_unread_nan(run: Callable[..., Tensor], form: str, method: str) -> None:
    """NaN in slots past the lengths, in images that nobody reads and in their positions changes no output and no gradient."""
    a = cases.moved(cases.build(f"packed_index_lengths-{form}", torch.float32) | METHODS[method])  # of 7, 5 and 0 slots
    names = [n for n in tolerance.floating(a) if n not in ("x", "key", "value", "gate")]
    grad = torch.randn(a["x"].shape).to(a["x"])
    clean, clean_grads = tolerance.gradients(run, a, names, grad)
    for name in ("visual_key", "visual_value"):
        a[name][1, 5:] = float("nan")
        a[name][2] = float("nan")
    for name in ("key_position", "value_position"):
        a[name][6] = float("nan")  # a slot of image 0, which only a sequence without rows reads
    out, grads = tolerance.gradients(run, a, names, grad)
    torch.testing.assert_close(out, clean)
    for n in names:
        torch.testing.assert_close(grads[n], clean_grads[n], msg=lambda m, n=n: f"{n}: {m}")
