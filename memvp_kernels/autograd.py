"""A call that is trained and that nobody watches, as one autograd function: the registered op without the dispatcher's Python.

PyTorch's road through a custom op costs a fifth of a millisecond in each direction, more than the GPU needs for a short batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memvp_kernels import torch_op as ops
from memvp_kernels.problem import SHARED

__all__ = ["Call", "FusedFFN", "Restore", "with_matrices"]

#: x's dtype → key, value, gate and the biases, made for one pass and kept by nobody.
Restore = Callable[[torch.dtype], dict[str, Tensor | None]]


class Call(NamedTuple):
    """What a call is besides the tensors that may be trained.

    Attributes:
        names: of these, in their order.
        fixed: the other tensors.
        scalars, keep, backend, autocast: as :func:`ops.run_forward` takes them.
        restore: makes frozen weights while the forward, and again the backward, runs.
    """

    names: tuple[str, ...]
    fixed: dict[str, Tensor | None]
    scalars: dict[str, Any]
    keep: int
    backend: str
    autocast: torch.dtype | None
    restore: Restore | None = None


def with_matrices(tensors: dict[str, Tensor | None], restore: Restore | None) -> dict[str, Tensor | None]:
    """The tensors, and those that `restore` makes."""
    x = tensors["x"]
    assert x is not None
    return tensors if restore is None else {**tensors, **restore(x.dtype)}


class FusedFFN(torch.autograd.Function):
    """(y, carriers) from the arguments of `call.names` and the carriers, all of `ops.CARRIERS` or none.

    Keeps what the registered op keeps, but for restored matrices. A carrier's gradient is the sum of those that this call was given
    and its own, written where the former lay.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *trained: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {**call.fixed, **dict(zip(call.names, trained, strict=False))}
        y, pre, scores = ops.run_forward(
            with_matrices(given, call.restore), call.scalars, call.keep, True, call.backend, call.autocast
        )
        kept, ctx.present = ops.pack({**given, "residual": None, "pre": pre, "scores": scores})
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.call = call._replace(fixed={})
        return y, *trained[len(call.names) :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return FusedFFN._gradients(ctx, grad, incoming)
        with torch.no_grad():
            # Sums of their own: what came in stays as it is, for the graph of this backward.
            sums = tuple(t if t is None else t.detach().clone() for t in incoming)
            found = FusedFFN._gradients(ctx, grad, sums)
        made = [t for t in found if t is not None]
        # The gradients depend on all of these, so that whoever asks for a derivative of one meets the refusal.
        sources = [t for t in (grad, *incoming, *ctx.saved_tensors) if t is not None and t.requires_grad]
        refused = iter(_Refused.apply(len(made), *made, *sources))  # type: ignore[no-untyped-call]
        return tuple(t if t is None else next(refused) for t in found)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor | None, incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if grad is None:
            return None, *(None,) * len(call.names), *incoming
        tensors = with_matrices(ops.unpack(ctx.saved_tensors, ctx.present), call.restore)
        names = (*call.names, *ops.CARRIERS[: len(incoming)])
        wanted = [name for name, wants in zip(names, ctx.needs_input_grad[1:], strict=True) if wants]
        # Made by the next call's backward and for this one alone, so it may be written to.
        sums = {name: t for name, t in zip(SHARED, incoming, strict=False) if t is not None}
        found = ops.run_backward(
            grad, tensors, call.scalars, [n for n in wanted if n != "residual"], call.backend, call.autocast, sums
        )
        if "residual" in wanted:
            # Under autocast it may be wider than y: autograd casts a gradient to the dtype of its input.
            found["residual"] = grad
        return None, *map(found.get, names)


class _Refused(torch.autograd.Function):
    """Gradients under create_graph: fine to have, but the backward's own derivative is not known."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("fused_ffn has no second derivative: its backward can't be differentiated")
