"""The operator as PyTorch sees it: two registered ops, forward and backward, with their fake kernels and vmap rules.

Arguments cross the ops as a list of the tensors that are present. Problem, backend and autocast's casts are decided inside, where the
tensors are real, and again in the backward, so that no cast copy of a weight is kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._guards import TracingContext
from torch.fx import traceback

from memvp_kernels.autograd import (
    ACCUMULATORS,
    KEEP_HIDDEN,
    KEEP_SCORES,
    draw_seed,
    gradient_like,
    join_memory,
    kept,
    run_backward,
    run_forward,
    split_memory,
)
from memvp_kernels.batched_gradients import one_by_one
from memvp_kernels.checks import SCALARS, TENSORS, Options, cast_dtype
from memvp_kernels.dispatch import require
from memvp_kernels.problem import has_slots

__all__ = ["backward_op", "call_op", "forward_op", "pack", "unpack"]

#: Every tensor that crosses an op, by the bit that says whether it does.
_CROSSING = (*TENSORS, "memory", "seed", "pre", "scores", "key_operand", "value_operand", *ACCUMULATORS)
#: Part of what crosses, in the bits above: PyTorch's caches of compiled graphs on disk know an op by its arguments, not by this file.
#: To be raised with every change of `_CROSSING` or of what an op means.
_LAYOUT = 3 << len(_CROSSING)


def call_op(tensors: dict[str, Tensor | None], options: Options) -> Tensor:
    """A checked call through the dispatcher, for whatever has to see it.

    Raises:
        RuntimeError: the backend was named and can't run on this machine.
    """
    x = tensors["x"]
    assert x is not None
    require(options.backend, x.device)
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        _count_flops()
    if options.scalars["dropout_p"] != 0 and tensors["visual_key"] is not None:
        tensors["seed"] = draw_seed(x.device)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    keep = kept(tensors, options.recompute) if training else 0
    return forward_op(*pack(tensors), *options.scalars.values(), keep, training, options.backend, options.autocast)[0]


def _count_flops() -> None:
    """Let PyTorch's counter of FLOPs, which somebody imported, count the ops."""
    from memvp_kernels import flops

    def of_forward(tensors: list[Tensor], present: int, *rest: Any, out_val: Any = None) -> int:
        *scalars, keep, training, backend, autocast = rest
        return flops.forward(unpack(tensors, present), _options(scalars, backend, autocast), keep, training)

    def of_backward(grad: Tensor, tensors: list[Tensor], present: int, *rest: Any, out_val: Any = None) -> int:
        *scalars, needs, backend, autocast = rest
        return flops.backward(grad, unpack(tensors, present), _options(scalars, backend, autocast), _wanted(needs))

    ops = torch.ops.memvp_kernels
    flops.count({ops.ffn_forward: of_forward, ops.ffn_backward: of_backward})


def pack(tensors: Mapping[str, Tensor | None]) -> tuple[list[Tensor], int]:
    """What crosses an op: the tensors that are there, and a bit for each name in `_CROSSING` that says which.

    A list, because PyTorch's Python dispatch walks the schema once per argument: with two dozen arguments that alone took
    0.2 ms a call.
    """
    tensors, there, present = dict(tensors), [], _LAYOUT
    join_memory(tensors)
    for bit, name in enumerate(_CROSSING):
        t = tensors.get(name)
        if t is not None:
            there.append(t)
            present |= 1 << bit
    return there, present


def unpack(tensors: Sequence[Tensor], present: int) -> dict[str, Tensor | None]:
    """The inverse of :func:`pack`."""
    found = iter(tensors)
    bound = {name: next(found) if present >> bit & 1 else None for bit, name in enumerate(_CROSSING)}
    split_memory(bound)
    return bound


def _options(scalars: Sequence[Any], backend: str, autocast: torch.dtype | None) -> Options:
    return Options(dict(zip(SCALARS, scalars, strict=True)), False, backend, autocast)


def _wanted(bits: int) -> list[str]:
    return [name for bit, name in enumerate(_CROSSING) if bits >> bit & 1]


def _kept_shapes(tensors: Mapping[str, Tensor | None], keep: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of the pre-activations and the scores; (0,) for what isn't kept."""
    x, key, visual_key = tensors["x"], tensors["key"], tensors["visual_key"]
    assert x is not None
    rows = math.prod(x.shape[:-1])
    pre = (1 if tensors["gate"] is None else 2, rows, key.shape[0]) if keep & KEEP_HIDDEN and key is not None else (0,)
    scores: tuple[Any, ...] = (0,)
    if keep & KEEP_SCORES and visual_key is not None and has_slots(visual_key):
        scores = (rows, visual_key.shape[-2])
    return pre, scores


def _refuse_memory_budget() -> None:
    """Under a budget PyTorch draws random numbers again in the backward, others than the forward's; its own dropout's too."""
    if TracingContext.try_get() is None:
        return
    region = (traceback.get_current_meta().get("custom") or {}).get("_region_activation_memory_budget", 1)
    budget = min(torch._functorch.config.activation_memory_budget, region)
    if budget < 1:
        raise RuntimeError(
            f"dropout_p: wanted an activation memory budget of 1 under torch.compile, got {budget}, with which PyTorch draws the dropout "
            "again in the backward; use recompute=True or torch.utils.checkpoint to save memory, or leave out the dropout"
        )


def _member_by_member(op: Callable[..., Any], info: Any, in_dims: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The op's results for each member of a batch; arguments are tensors, lists of them, or the same for all."""

    def member(value: Any, dims: Any, i: int) -> Any:
        if isinstance(value, list):
            return [member(v, d, i) for v, d in zip(value, dims, strict=True)]
        return value if dims is None else value.select(dims, i)

    return [
        op(*(member(v, d if isinstance(v, (Tensor, list)) else None, i) for v, d in zip(given, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]


@torch.library.custom_op("memvp_kernels::ffn_forward", mutates_args=())
def forward_op(
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_map: str | None,
    visual_drop: float,
    visual_scale: float,
    dropout_p: float,
    keep: int,
    training: bool,
    backend: str,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre-activations or empty, scores or empty); `keep` is a sum of `KEEP_HIDDEN` and `KEEP_SCORES`."""
    bound = unpack(tensors, present)
    scalars = (activation, visual_activation, visual_map, visual_drop, visual_scale, dropout_p)
    options = _options(scalars, backend, autocast)
    y, *saved = run_forward(bound, options, keep, training)
    pre, scores = (
        y.new_empty(shape) if t is None else t for t, shape in zip(saved, _kept_shapes(bound, keep), strict=True)
    )
    return y, pre, scores


@forward_op.register_fake
def _(tensors: list[Tensor], present: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dropout_p, keep, training, _backend, autocast = rest
    if training and dropout_p > 0:
        _refuse_memory_budget()
    x = tensors[0]
    pre, scores = _kept_shapes(unpack(tensors, present), keep)
    y = x.new_empty(x.shape, dtype=cast_dtype("x", x.dtype, autocast))
    return y, y.new_empty(pre), y.new_empty(scores)


@forward_op.register_vmap
def _(info: Any, in_dims: Any, *given: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call after the other: what a batch means to this operator, its sequences say."""
    calls = _member_by_member(forward_op, info, in_dims, given)
    return tuple(torch.stack(outs) for outs in zip(*calls, strict=True)), (0, 0, 0)


@torch.library.custom_op("memvp_kernels::ffn_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_map: str | None,
    visual_drop: float,
    visual_scale: float,
    dropout_p: float,
    needs: int,
    backend: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """The gradients of the tensors whose bit is set in `needs`, in the order of `_CROSSING`."""
    bound = unpack(tensors, present)
    scalars = (activation, visual_activation, visual_map, visual_drop, visual_scale, dropout_p)
    options = _options(scalars, backend, autocast)
    return list(run_backward(grad, bound, options, _wanted(needs)).values())


@backward_op.register_fake
def _(grad: Tensor, tensors: list[Tensor], present: int, *rest: Any) -> list[Tensor]:
    *_, needs, _backend, _autocast = rest
    bound = unpack(tensors, present)
    likes = (gradient_like(name, bound) for name in _wanted(needs))
    return [like.new_empty(like.shape, dtype=dtype) for like, dtype in likes]


@backward_op.register_vmap
def _(info: Any, in_dims: Any, *given: Any) -> tuple[list[Tensor], list[int]]:
    calls = _member_by_member(backward_op, info, in_dims, given)
    found = [torch.stack(grads) for grads in zip(*calls, strict=True)]
    return found, [0] * len(found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, present, *scalars, keep, _, backend, autocast = inputs
    _, pre, scores = output
    ctx.mark_non_differentiable(pre, scores)
    ctx.set_materialize_grads(False)
    saved = unpack(tensors, present)
    # A residual's gradient is the output's own, and an accumulator's values are never read.
    saved |= dict.fromkeys(("residual", *ACCUMULATORS))
    saved["pre"] = pre if keep & KEEP_HIDDEN else None
    saved["scores"] = scores if keep & KEEP_SCORES else None
    flat, ctx.saved = pack(saved)
    ctx.save_for_backward(*flat)
    ctx.present, ctx.scalars, ctx.backend, ctx.autocast = present, scalars, backend, autocast


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (None,) * 11
    names = _wanted(ctx.present)
    if grad is None:
        return [None] * len(names), *rest
    wants = dict(zip(names, ctx.needs_input_grad[0], strict=True))
    # Under autocast it may be wider than y: autograd casts a gradient to the dtype of its input.
    residual = grad if wants.pop("residual", False) else None
    needs = sum(1 << _CROSSING.index(name) for name, want in wants.items() if want)
    arguments = (list(ctx.saved_tensors), ctx.saved, *ctx.scalars, needs, ctx.backend, ctx.autocast)
    found = iter(one_by_one(lambda g: backward_op(g, *arguments), [grad]) if needs else ())
    return [residual if n == "residual" else next(found) if wants[n] else None for n in names], *rest


forward_op.register_autograd(_backward, setup_context=_setup_context)
