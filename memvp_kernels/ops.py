"""The operator as PyTorch sees it: two registered ops, forward and backward, and a direct road past the dispatcher.

Arguments cross the ops flat and in one order (`TENSORS`), each side makes the same :class:`Problem` of them, and the backend is
chosen inside, where real tensors are. What is kept for the backward besides the inputs is the pre-activations and the scores.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.arguments import TENSORS, check_values
from memvp_kernels.choose import choose
from memvp_kernels.problem import Problem, Segments

__all__ = ["DIFFERENTIABLE", "backward_op", "forward_op", "run_forward"]

#: Arguments with a gradient from the backward op, in its order; residual's is the output's own.
DIFFERENTIABLE = tuple(
    name for name in TENSORS if name not in ("residual", "visual_lengths", "visual_index", "cu_seqlens")
)
_SCALARS = ("activation", "visual_activation", "visual_scale", "dropout_p")


def _narrow(t: Tensor | None) -> Tensor | None:
    """int32, with what doesn't fit kept out of range rather than wrapped into it."""
    return t if t is None or t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def _rows(t: Tensor | None, width: int) -> Tensor | None:
    return None if t is None else t.reshape(math.prod(t.shape[:-1]), width)


def normalise(tensors: dict[str, Tensor | None], seed: Tensor | None, scalars: dict[str, Any]) -> Problem:
    """Checked arguments to a Problem: x as rows, memory as (R, M, ·), empty memory as none."""
    x = tensors["x"]
    assert x is not None
    width = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    memory = {
        name: tensors[name] for name in ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
    }
    key = memory["visual_key"]
    if key is None or key.shape[-2] == 0:
        memory = dict.fromkeys(memory)
        segments = Segments(rows, 1, rows, shared=True)
        seed = None
    else:
        index, cu_seqlens = _narrow(tensors["visual_index"]), _narrow(tensors["cu_seqlens"])
        if index is None and (key.dim() == 2 or (key.shape[0] == 1 and cu_seqlens is None)):
            segments = Segments(rows, 1, rows, lengths=_narrow(tensors["visual_lengths"]), shared=True)
        else:
            sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            length = x.shape[1] if cu_seqlens is None else None
            segments = Segments(rows, sequences, length, cu_seqlens, index, _narrow(tensors["visual_lengths"]))
        if key.dim() == 2:
            same = memory["visual_value"] is key
            memory["visual_key"] = key[None]
            memory["visual_value"] = memory["visual_key"] if same else memory["visual_value"][None]  # type: ignore[index]
    return Problem(
        x=x.reshape(rows, width),
        residual=_rows(tensors["residual"], width),
        seed=seed,
        segments=segments,
        **{n: tensors[n] for n in ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")},  # type: ignore[arg-type]
        **memory,  # type: ignore[arg-type]
        **scalars,
    )


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The casts were made at the door; inside a backend every dtype is meant."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def run_forward(
    tensors: dict[str, Tensor | None],
    seed: Tensor | None,
    scalars: dict[str, Any],
    save_hidden: bool,
    save_scores: bool,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward on real tensors, without the dispatcher: y like x, and what the backward keeps."""
    x = tensors["x"]
    assert x is not None
    problem = normalise(tensors, seed, scalars)
    check_values(problem)
    module = choose(problem, backend, training=training)
    if problem.rows == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format), None, None
    with _without_autocast(x.device):
        y, pre, scores = module.forward(problem, save_hidden=save_hidden, save_scores=save_scores)
    return y.reshape(x.shape), pre, scores


def _bind(tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    return dict(zip(TENSORS, tensors, strict=True))


@torch.library.custom_op("memvp_kernels::ffn_forward", mutates_args=())
def forward_op(
    x: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    visual_key: Tensor | None,
    visual_value: Tensor | None,
    visual_basis: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    key_position: Tensor | None,
    value_position: Tensor | None,
    residual: Tensor | None,
    visual_lengths: Tensor | None,
    visual_index: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    save_hidden: bool,
    save_scores: bool,
    training: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, pre-activations or empty, scores or empty)."""
    tensors = _bind((x, key, value, visual_key, visual_value, visual_basis, gate, key_bias, gate_bias, value_bias,
                     key_position, value_position, residual, visual_lengths, visual_index, cu_seqlens))  # fmt: skip
    scalars = dict(zip(_SCALARS, (activation, visual_activation, visual_scale, dropout_p), strict=True))
    y, pre, scores = run_forward(tensors, seed, scalars, save_hidden, save_scores, training, backend)
    shapes = _kept_shapes(tensors, save_hidden, save_scores)
    kept = [t if t is not None else x.new_empty(shape) for t, shape in zip((pre, scores), shapes, strict=True)]
    return y, kept[0], kept[1]


def _kept_shapes(
    tensors: dict[str, Tensor | None], save_hidden: bool, save_scores: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    x, key, visual_key = tensors["x"], tensors["key"], tensors["visual_key"]
    assert x is not None
    rows = math.prod(x.shape[:-1])
    pre = (1 if tensors["gate"] is None else 2, rows, key.shape[0]) if save_hidden and key is not None else (0,)
    scores = (rows, visual_key.shape[-2]) if save_scores and visual_key is not None else (0,)
    return pre, scores


@forward_op.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = _bind((x, *rest[: len(TENSORS) - 1]))
    save_hidden, save_scores = rest[-4], rest[-3]
    pre, scores = _kept_shapes(tensors, save_hidden, save_scores)
    return x.new_empty(x.shape), x.new_empty(pre), x.new_empty(scores)


@torch.library.custom_op("memvp_kernels::ffn_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    visual_key: Tensor | None,
    visual_value: Tensor | None,
    visual_basis: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    value_bias: Tensor | None,
    key_position: Tensor | None,
    value_position: Tensor | None,
    visual_lengths: Tensor | None,
    visual_index: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    pre: Tensor | None,
    scores: Tensor | None,
    activation: str,
    visual_activation: str,
    visual_scale: float,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of `DIFFERENTIABLE` for which `needs` is true, in that order."""
    tensors = _bind((x, key, value, visual_key, visual_value, visual_basis, gate, key_bias, gate_bias, value_bias,
                     key_position, value_position, None, visual_lengths, visual_index, cu_seqlens))  # fmt: skip
    scalars = dict(zip(_SCALARS, (activation, visual_activation, visual_scale, dropout_p), strict=True))
    wanted = [name for name, need in zip(DIFFERENTIABLE, needs, strict=True) if need]
    problem = normalise(tensors, seed, scalars)
    # An empty memory was dropped from the problem: its gradients are zeros.
    present = frozenset(n for n in wanted if getattr(problem, n) is not None)
    grads: dict[str, Tensor] = {}
    if problem.rows and present:
        with _without_autocast(x.device):
            module = choose(problem, backend, training=True)
            grads = module.backward(problem, grad.reshape(problem.rows, problem.width), pre, scores, present)
    out = []
    for name in wanted:
        argument = tensors[name]
        assert argument is not None
        found = grads.get(name)
        out.append(argument.new_zeros(argument.shape) if found is None else found.reshape(argument.shape).contiguous())
    return out


@backward_op.register_fake
def _(grad: Tensor, *rest: Any) -> list[Tensor]:
    arguments = dict(zip([n for n in TENSORS if n != "residual"], rest[: len(TENSORS) - 1], strict=True))
    needs = rest[-2]
    return [arguments[n].new_empty(arguments[n].shape) for n, need in zip(DIFFERENTIABLE, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors = list(inputs[: len(TENSORS)])
    tensors[TENSORS.index("residual")] = None
    _, pre, scores = output
    ctx.mark_non_differentiable(pre, scores)
    ctx.set_materialize_grads(False)
    # An empty tensor stands for "not kept": the backward forms it again.
    ctx.save_for_backward(*tensors, inputs[len(TENSORS)], pre if inputs[-4] else None, scores if inputs[-3] else None)
    ctx.scalars = inputs[len(TENSORS) + 1 : len(TENSORS) + 1 + len(_SCALARS)]
    ctx.backend = inputs[-1]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    arguments = dict.fromkeys(
        (
            *TENSORS,
            "seed",
            "activation",
            "visual_activation",
            "visual_scale",
            "dropout_p",
            "save_hidden",
            "save_scores",
            "training",
            "backend",
        )
    )
    if grad is None:
        return tuple(arguments.values())
    saved = ctx.saved_tensors
    tensors = _bind(saved[: len(TENSORS)])
    wants = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    needs = [bool(wants[n]) for n in DIFFERENTIABLE]
    if any(needs):
        flat = [t for n, t in tensors.items() if n != "residual"]
        found = iter(backward_op(grad, *flat, *saved[len(TENSORS) :], *ctx.scalars, needs, ctx.backend))
        arguments.update((n, next(found)) for n, need in zip(DIFFERENTIABLE, needs, strict=True) if need)
    if wants["residual"]:
        arguments["residual"] = grad
    return tuple(arguments.values())


forward_op.register_autograd(_backward, setup_context=_setup_context)
