"""The operator as PyTorch sees it: two registered ops, forward and backward, and a direct road past the dispatcher.

Arguments cross the ops as a list of the tensors that are there, each side makes the same :class:`Problem` of them, and the backend is
chosen inside, where real tensors are. What is kept for the backward besides the inputs is the pre-activations and the scores:
autocast's casts are made inside too, and again in the backward, so that no copy of a weight is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.checks import TENSORS, cast_dtype, check_values
from memvp_kernels.dispatch import choose
from memvp_kernels.problem import SHARED, Problem, Segments

__all__ = [
    "CARRIERS",
    "KEEP_HIDDEN",
    "KEEP_SCORES",
    "admit",
    "autocast_dtype",
    "backward_op",
    "forward_op",
    "narrow",
    "normalise",
    "pack",
    "run_backward",
    "run_forward",
    "unpack",
]

#: What the forward keeps for the backward, as bits.
KEEP_HIDDEN, KEEP_SCORES = 1, 2

#: The tensors whose gradients are those of `SHARED`; their numbers are never read.
CARRIERS = ("core_carrier", "key_carrier", "value_carrier")
_CARRIED = dict(zip(CARRIERS, SHARED, strict=True))

#: Every tensor that crosses an op, by the bit that says whether it does; pre and scores only on the way back, carriers only forward.
_CROSSING = (*TENSORS, "seed", "pre", "scores", "key_operand", "value_operand", *CARRIERS)
_SCALARS = ("activation", "visual_activation", "visual_scale", "dropout_p")


def narrow(t: Tensor | None) -> Tensor | None:
    """int32, with what doesn't fit kept out of range rather than wrapped into it."""
    return t if t is None or t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def _rows(t: Tensor | None, width: int) -> Tensor | None:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), width)


def _has_slots(visual_key: Tensor) -> bool:
    """Whether there is a slot to read at all: a memory without rows or without slots is none."""
    return 0 not in visual_key.shape[:-1]


def normalise(
    tensors: Mapping[str, Tensor | None], scalars: Mapping[str, Any], autocast: torch.dtype | None = None
) -> Problem:
    """Checked arguments (and dropout's seed) to a Problem: x as rows, memory as (R, M, ·), empty memory as none."""
    if autocast is not None:
        tensors = {n: t if t is None else t.to(cast_dtype(n, t.dtype, autocast)) for n, t in tensors.items()}
    x, seed = tensors["x"], tensors.get("seed")
    assert x is not None
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    key_operand, value_operand = tensors.get("key_operand"), tensors.get("value_operand")
    memory = {
        name: tensors[name] for name in ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
    }
    key = memory["visual_key"]
    if key is None or not _has_slots(key):
        memory = dict.fromkeys(memory)
        key_operand = value_operand = None
        segments = Segments(rows, 1, rows, shared=True)
        seed = None
    else:
        index, cu_seqlens = narrow(tensors["visual_index"]), narrow(tensors["cu_seqlens"])
        if index is None and (key.dim() == 2 or (key.shape[0] == 1 and cu_seqlens is None)):
            segments = Segments(rows, 1, rows, lengths=narrow(tensors["visual_lengths"]), shared=True)
        else:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            length = x.shape[1] if cu_seqlens is None else None
            segments = Segments(rows, sequences, length, cu_seqlens, index, narrow(tensors["visual_lengths"]))
        if key.dim() == 2:
            same = memory["visual_value"] is key
            memory["visual_key"] = key[None]
            memory["visual_value"] = memory["visual_key"] if same else memory["visual_value"][None]  # type: ignore[index]
    return Problem(
        x=x.reshape(rows, width),
        residual=_rows(tensors["residual"], width),
        seed=seed,
        segments=segments,
        key_operand=key_operand,
        value_operand=value_operand,
        **{n: tensors[n] for n in ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")},  # type: ignore[arg-type]
        **memory,  # type: ignore[arg-type]
        **scalars,
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None outside it, and on a device that has no autocast (meta)."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The casts were made in the problem; inside a backend every dtype is meant."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def admit(
    tensors: Mapping[str, Tensor | None],
    scalars: Mapping[str, Any],
    training: bool,
    backend: str,
    autocast: torch.dtype | None = None,
) -> tuple[Problem, ModuleType]:
    """The problem and the backend that will compute it.

    Raises:
        ValueError: an index, a length or an offset out of range.
        RuntimeError: `backend` was named and can't take this problem.
    """
    check_values(tensors)
    problem = normalise(tensors, scalars, autocast)
    return problem, choose(problem, backend, training=training)


def run_forward(
    tensors: Mapping[str, Tensor | None],
    scalars: Mapping[str, Any],
    keep: int,
    training: bool,
    backend: str,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward on real tensors, without the dispatcher: y like x, and what the backward keeps."""
    x = tensors["x"]
    assert x is not None
    problem, module = admit(tensors, scalars, training, backend, autocast)
    if problem.rows == 0:
        return x.new_empty(x.shape, dtype=problem.x.dtype), None, None
    with _without_autocast(x.device):
        y, pre, scores = module.forward(
            problem, save_hidden=bool(keep & KEEP_HIDDEN), save_scores=bool(keep & KEEP_SCORES)
        )
    return y.reshape(x.shape), pre, scores


def _gradient_of(name: str, tensors: Mapping[str, Tensor | None]) -> tuple[Tensor, torch.dtype]:
    """A tensor of the gradient's shape and device, and its dtype."""
    x = tensors["x"]
    argument = tensors["visual_key" if name == "core_carrier" else _CARRIED.get(name, name)]
    assert x is not None and argument is not None
    return argument, torch.promote_types(x.dtype, torch.float32) if name in _CARRIED else argument.dtype


def run_backward(
    grad: Tensor,
    tensors: Mapping[str, Tensor | None],
    scalars: Mapping[str, Any],
    wanted: Sequence[str],
    backend: str,
    autocast: torch.dtype | None = None,
    sums: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Backward on real tensors, without the dispatcher.

    Args:
        grad: of y.
        tensors: what the forward had, and its `pre` and `scores` where it kept them.
        wanted: names of `tensors`, or `CARRIERS`, whose gradients are float32 at least and not the carriers' own.
        sums: by the names of `SHARED`, in that dtype and contiguous: what their gradients are added to, in place.

    Returns:
        the gradients by name, in the order of `wanted`; for a carrier its sum where there is one.
    """
    problem = normalise(tensors, scalars, autocast)
    # An empty memory was dropped from the problem: its gradients are zeros.
    names = {name: _CARRIED.get(name, name) for name in wanted}
    known = frozenset(n for n in names.values() if getattr(problem, n) is not None)
    sums = {} if sums is None else sums
    grads: dict[str, Tensor] = {}
    if problem.rows and known:
        with _without_autocast(grad.device):
            module = choose(problem, backend, training=True)
            flat = grad.reshape(problem.rows, problem.width)
            grads = module.backward(problem, flat, tensors["pre"], tensors["scores"], known, sums)
    out = {}
    for name, known_as in names.items():
        like, dtype = _gradient_of(name, tensors)
        found = grads.get(known_as, sums.get(known_as))
        if found is None:
            out[name] = like.new_zeros(like.shape, dtype=dtype)
        else:
            out[name] = found.to(dtype).reshape(like.shape).contiguous()
    return out


def pack(tensors: Mapping[str, Tensor | None]) -> tuple[list[Tensor], int]:
    """What crosses an op: the tensors that are there, and a bit for each name in `_CROSSING` that says which.

    A list, because PyTorch's Python dispatch walks the schema once per argument: with two dozen arguments that alone took
    0.2 ms a call.
    """
    there, present = [], 0
    for bit, name in enumerate(_CROSSING):
        t = tensors.get(name)
        if t is not None:
            there.append(t)
            present |= 1 << bit
    return there, present


def unpack(tensors: Sequence[Tensor], present: int) -> dict[str, Tensor | None]:
    """The inverse of :func:`pack`."""
    found = iter(tensors)
    return {name: next(found) if present >> bit & 1 else None for bit, name in enumerate(_CROSSING)}


def _kept_shapes(tensors: Mapping[str, Tensor | None], keep: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Shapes of the pre-activations and the scores; (0,) for what isn't kept."""
    x, key, visual_key = tensors["x"], tensors["key"], tensors["visual_key"]
    assert x is not None
    rows = math.prod(x.shape[:-1])
    pre = (1 if tensors["gate"] is None else 2, rows, key.shape[0]) if keep & KEEP_HIDDEN and key is not None else (0,)
    scores: tuple[Any, ...] = (0,)
    if keep & KEEP_SCORES and visual_key is not None and _has_slots(visual_key):
        scores = (rows, visual_key.shape[-2])
    return pre, scores


@torch.library.custom_op("memvp_kernels::ffn_forward", mutates_args=())
def forward_op(
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    keep: int,
    training: bool,
    backend: str,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre-activations or empty, scores or empty); `keep` is a sum of `KEEP_HIDDEN` and `KEEP_SCORES`."""
    bound = unpack(tensors, present)
    scalars = dict(zip(_SCALARS, (activation, visual_activation, visual_scale, dropout_p), strict=True))
    y, *kept = run_forward(bound, scalars, keep, training, backend, autocast)
    pre, scores = (
        y.new_empty(shape) if t is None else t for t, shape in zip(kept, _kept_shapes(bound, keep), strict=True)
    )
    return y, pre, scores


@forward_op.register_fake
def _(
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    keep: int,
    training: bool,
    backend: str,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = tensors[0]
    pre, scores = _kept_shapes(unpack(tensors, present), keep)
    y = x.new_empty(x.shape, dtype=cast_dtype("x", x.dtype, autocast))
    return y, y.new_empty(pre), y.new_empty(scores)


@forward_op.register_vmap
def _(info: Any, in_dims: Any, tensors: list[Tensor], *rest: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call after the other: what a batch means to this operator, its sequences say."""
    calls = (
        forward_op([t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims[0], strict=True)], *rest)
        for i in range(info.batch_size)
    )
    return tuple(torch.stack(outs) for outs in zip(*calls, strict=True)), (0, 0, 0)


@torch.library.custom_op("memvp_kernels::ffn_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    needs: int,
    backend: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """The gradients of the tensors whose bit is set in `needs`, in the order of `_CROSSING`."""
    bound = unpack(tensors, present)
    scalars = dict(zip(_SCALARS, (activation, visual_activation, visual_scale, dropout_p), strict=True))
    wanted = [name for bit, name in enumerate(_CROSSING) if needs >> bit & 1]
    return list(run_backward(grad, bound, scalars, wanted, backend, autocast).values())


@backward_op.register_fake
def _(
    grad: Tensor,
    tensors: list[Tensor],
    present: int,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    needs: int,
    backend: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    bound = unpack(tensors, present)
    wanted = [name for bit, name in enumerate(_CROSSING) if needs >> bit & 1]
    return [like.new_empty(like.shape, dtype=dtype) for like, dtype in (_gradient_of(name, bound) for name in wanted)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, present, *scalars, keep, _, backend, autocast = inputs
    _, pre, scores = output
    ctx.mark_non_differentiable(pre, scores)
    ctx.set_materialize_grads(False)
    saved = unpack(tensors, present)
    # A residual's gradient is the output's own, and a carrier's numbers are never read.
    saved |= dict.fromkeys(("residual", *CARRIERS))
    saved["pre"] = pre if keep & KEEP_HIDDEN else None
    saved["scores"] = scores if keep & KEEP_SCORES else None
    flat, ctx.saved = pack(saved)
    ctx.save_for_backward(*flat)
    ctx.present, ctx.scalars, ctx.backend, ctx.autocast = present, scalars, backend, autocast


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (None,) * 9
    names = [name for bit, name in enumerate(_CROSSING) if ctx.present >> bit & 1]
    if grad is None:
        return [None] * len(names), *rest
    wants = dict(zip(names, ctx.needs_input_grad[0], strict=True))
    # Under autocast it may be wider than y: autograd casts a gradient to the dtype of its input.
    residual = grad if wants.pop("residual", False) else None
    needs = sum(1 << _CROSSING.index(name) for name, want in wants.items() if want)
    arguments = (list(ctx.saved_tensors), ctx.saved, *ctx.scalars, needs, ctx.backend, ctx.autocast)
    found = iter(backward_op(grad, *arguments) if needs else ())
    return [residual if n == "residual" else next(found) if wants[n] else None for n in names], *rest


forward_op.register_autograd(_backward, setup_context=_setup_context)
