"""The one tolerance of the project (SPEC section 2): at most twice PyTorch's own error in the same dtype.

`plain` is the two-branch form in ordinary PyTorch ops, with autograd, in the arguments' own dtype. It and the candidate are both
compared with the float64 reference; the candidate may be at most twice as far off, in norm and at the worst element. On tensors as
small as the tests' the worst element is a matter of luck (two equally good summations differ by three), so PyTorch's own error is the
largest of a few orders of the same sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels import reference

FLOATING = (
    "x", "key", "value", "visual_key", "visual_value", "visual_basis", "gate", "key_bias", "gate_bias", "value_bias",
    "key_position", "value_position", "residual",
)  # fmt: skip

#: How far two results in float64 may be apart, relatively: its own rounding is as far below as float32's is above, which so shows.
FLOAT64 = (torch.finfo(torch.float64).eps * torch.finfo(torch.float32).eps) ** 0.5

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda z: z,
}


def plain(
    x: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    visual_key: Tensor | None = None,
    visual_value: Tensor | None = None,
    **o: Any,
) -> Tensor:
    """The two-branch form in plain PyTorch ops and x's dtype; arguments as `reference.ffn`."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(x.dtype)

    act = _ACTIVATIONS[o.get("activation", "silu")]
    vact = _ACTIVATIONS[o.get("visual_activation") or o.get("activation", "silu")]
    y = torch.zeros_like(rows)
    if key is not None and value is not None:
        hidden = F.linear(rows, key, cast(o.get("key_bias")))
        gate = o.get("gate")
        hidden = act(hidden) if gate is None else act(F.linear(rows, gate, cast(o.get("gate_bias")))) * hidden
        y = F.linear(hidden, value.T, cast(o.get("value_bias")))
    if visual_key is not None and visual_value is not None:
        kp, vp, basis, lengths = (
            o.get(n) for n in ("key_position", "value_position", "visual_basis", "visual_lengths")
        )
        p, keep = o.get("dropout_p", 0.0), o.get("keep")
        memory = [t if t.dim() == 3 else t[None] for t in (visual_key, visual_value)]
        parts, covered = [], 0
        for first, end, row in reference.sequences(x, visual_key, o.get("visual_index"), o.get("cu_seqlens")):
            xs, part = rows[first:end], torch.zeros_like(rows[first:end])
            if row >= 0:
                slots = memory[0].shape[1] if lengths is None else int(lengths[row])
                if basis is None:
                    k, v = (
                        m[row] if q is None else m[row].float() + q.float() if x.dtype != torch.float64 else m[row] + q
                        for m, q in zip(memory, (kp, vp), strict=True)
                    )
                    k, v = k[:slots], v.to(x.dtype)[:slots]
                    k = k.to(x.dtype) if o.get("visual_map") is None else F.silu(k).to(x.dtype)
                    scores = (xs if o.get("visual_map") is None else F.silu(xs)) @ k.T
                elif o.get("visual_map") is not None:
                    b, wide = memory[1][row].to(x.dtype)[:slots], torch.promote_types(x.dtype, torch.float32)
                    k = memory[0][row][:slots].to(wide) @ basis.to(wide)
                    k = k if kp is None else k + kp[:slots].to(wide)
                    scores = F.silu(xs) @ F.silu(k).to(x.dtype).T
                else:
                    a, b = (m[row].to(x.dtype)[:slots] for m in memory)
                    scores = (xs @ cast(basis).T) @ a.T
                    scores = scores if kp is None else scores + xs @ cast(kp)[:slots].T
                visual = vact(scores)
                if o.get("visual_drop", 0.0) > 0:
                    visual = visual * reference.stays(scores.detach(), o["visual_drop"])
                if p > 0:
                    visual = visual * keep[first:end, :slots] / (1 - p) if p < 1 else visual * 0
                visual = (visual * o.get("visual_scale", 1.0)).to(x.dtype)
                if basis is None:
                    part = visual @ v
                else:
                    part = (visual @ b) @ cast(basis)
                    part = part if vp is None else part + visual @ cast(vp)[:slots]
            parts.append(part)
            covered += end - first
        y = y + torch.cat([*parts, torch.zeros_like(rows[covered:])])
    y = y.reshape(x.shape)
    residual = o.get("residual")
    return y if residual is None else y + residual


#: Where each argument has the dimensions that a product sums over: d and F of the FFN, r of a factored memory's basis.
_WIDTH = ("x", "key", "value", "gate", "visual_basis", "key_position", "value_position", "residual", "value_bias")
_PAIRS = ("key", "value", "gate", "key_bias", "gate_bias")
_ORDERS = 4


def reordered(seed: int) -> Callable[..., Tensor]:
    """`plain` with the terms of its sums in another order: the same mathematics, another draw of PyTorch's rounding."""

    def permuted(**a: Any) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        factored = a.get("visual_basis") is not None
        width = (*_WIDTH, *(() if factored else ("visual_key", "visual_value")))
        changes = [(width, -1, a["x"].shape[-1])]
        if a.get("key") is not None:
            changes.append((_PAIRS, 0, a["key"].shape[0]))
        if factored:
            changes += [(("visual_basis",), 0, a["visual_basis"].shape[0])]
        orders = [torch.randperm(size, generator=draw).to(a["x"].device) for _, _, size in changes]
        if factored:
            changes.append((("visual_key", "visual_value"), -1, a["visual_basis"].shape[0]))
            orders.append(orders[-1])
        for (names, dimension, _), order in zip(changes, orders, strict=True):
            a |= {n: a[n].index_select(dimension, order) for n in names if a.get(n) is not None}
        return plain(**a).index_select(-1, orders[0].argsort())

    return permuted


def errors(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """(norm of the error, its largest element), absolute."""
    difference = (out.detach().double() - exact.detach().double()).flatten()
    return difference.norm().item(), difference.abs().max().item() if difference.numel() else 0.0


def assert_within_twice(out: Tensor, exact: Tensor, theirs: Tensor | Sequence[Tensor], what: str = "output") -> None:
    """`out` is at most twice as far from `exact` as PyTorch's `theirs`, one result or several with their sums in other orders.

    PyTorch can be exact by luck on a tiny tensor; even a correctly rounded result may be off by half a unit in the last place of
    each element, so that rounding is allowed in any case.
    """
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, wanted {tuple(exact.shape)}"
    assert torch.isfinite(out).all() or not torch.isfinite(exact).all(), f"{what}: not finite"
    if out.dtype == torch.float64:
        # The reference has float64's own rounding here: PyTorch's tolerance for comparing two float64 results.
        torch.testing.assert_close(out.detach(), exact.detach(), msg=lambda m: f"{what}: {m}")
        return
    unit = torch.finfo(out.dtype).eps
    rounding = exact.detach().double().abs() * unit / 2
    mine = errors(out, exact)
    baseline = [
        max(e)
        for e in zip(*(errors(t, exact) for t in ([theirs] if isinstance(theirs, Tensor) else theirs)), strict=True)
    ]
    for name, m, y, rounded in (
        ("norm", mine[0], baseline[0], rounding.norm().item()),
        ("max", mine[1], baseline[1], rounding.max().item() if rounding.numel() else 0.0),
    ):
        assert m <= max(2 * y, rounded), (
            f"{what}: {name} error {m:.3e}, PyTorch's own {y:.3e} (allowed: twice that, or one rounding {rounded:.3e})"
        )


def gradients(
    function: Any, arguments: Mapping[str, Any], names: list[str], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of `function(**arguments)` and the gradients of `names` (fresh leaves; tensors passed twice stay one)."""
    leaves: dict[int, Tensor] = {}
    bound = dict(arguments)
    for name in names:
        source = arguments[name]
        leaves.setdefault(id(source), source.detach().clone(memory_format=torch.preserve_format).requires_grad_())
        bound[name] = leaves[id(source)]
    out = function(**bound)
    found: Sequence[Tensor | None] = [None] * len(names)
    if out.requires_grad:  # a definition in which nothing is read is a constant
        found = torch.autograd.grad(out, [bound[n] for n in names], grad.to(out.dtype), allow_unused=True)
    return out, {n: torch.zeros_like(bound[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def floating(arguments: Mapping[str, Any]) -> list[str]:
    """The floating-point arguments that are given."""
    return [n for n in FLOATING if arguments.get(n) is not None]


def some_gradient(x: Tensor) -> Tensor:
    """Of an output like x, the same in every call."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(x.device, x.dtype)


def results(
    function: Any, arguments: Mapping[str, Any], names: list[str] | None = None, grad: Tensor | None = None
) -> list[Tensor]:
    """The output of `function(**arguments)` and the gradients of `names`; defaults as in :func:`check`."""
    names = floating(arguments) if names is None else names
    grad = some_gradient(arguments["x"]) if grad is None else grad
    out, found = gradients(function, arguments, names, grad)
    return [out.detach(), *found.values()]


def assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Equal to the bit."""
    assert len(found) == len(wanted)
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"tensor {i}"


def check(
    candidate: Any,
    arguments: Mapping[str, Any],
    *,
    names: list[str] | None = None,
    keep: Tensor | None = None,
    grad: Tensor | None = None,
    through: Callable[..., Tensor] = lambda ffn, **a: ffn(**a),
) -> None:
    """Output and every gradient of `candidate(**arguments)` against the reference, by the rule above.

    Args:
        candidate: a callable with the signature of `fused_ffn`.
        names: arguments whose gradients are compared; default: every floating-point one given.
        keep: the dropout mask that the candidate uses.
        grad: gradient of the output; default: random from a fixed seed.
        through: what the candidate makes of several calls, with one function in the operator's place: through(ffn, **arguments).
    """
    names = floating(arguments) if names is None else names
    x = arguments["x"]
    grad = some_gradient(x) if grad is None else grad
    judged = dict(arguments, keep=keep) if keep is not None else dict(arguments)
    for extra in ("backend", "recompute"):
        judged.pop(extra, None)
    exact, exact_grads = gradients(functools.partial(through, reference.ffn), judged, names, grad)
    orders = [plain, *(reordered(seed) for seed in range(1, _ORDERS))] if x.dtype != torch.float64 else [plain]
    theirs = [gradients(functools.partial(through, order), judged, names, grad) for order in orders]
    out, grads = gradients(candidate, arguments, names, grad)
    assert out.dtype == x.dtype and out.shape == x.shape
    assert_within_twice(out, exact, [t for t, _ in theirs])
    for n in names:
        assert grads[n].dtype == arguments[n].dtype, f"gradient of {n}: {grads[n].dtype}, wanted {arguments[n].dtype}"
        assert_within_twice(grads[n], exact_grads[n], [g[n] for _, g in theirs], f"gradient of {n}")
