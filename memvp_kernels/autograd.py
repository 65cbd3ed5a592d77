"""The operator on real tensors: forward and backward, and the autograd function that joins them without PyTorch's dispatcher.

A registered op costs a fifth of a millisecond in each direction, more than a GPU needs for a short batch. Where no tracing, transform,
subclass or dispatch mode has to see the call, :func:`call_directly` does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memvp_kernels.batched_gradients import one_by_one
from memvp_kernels.checks import INTEGERS, TENSORS, Options, autocast_dtype
from memvp_kernels.dispatch import choose
from memvp_kernels.feature_map import needs_of_backend, with_key, with_key_gradients
from memvp_kernels.problem import BEHIND_PRE, BEHIND_SCORES, BEHIND_VISUAL, SHARED, Problem, normalize
from memvp_kernels.value_checks import check_values

__all__ = [
    "ACCUMULATORS", "KEEP_HIDDEN", "KEEP_SCORES", "Dequantize", "Step", "call_directly", "can_bypass_dispatcher", "draw_seed",
    "gradient_like", "join_memory", "kept", "prepare_step", "run_backward", "run_forward", "split_memory", "without_autocast",
]  # fmt: skip

#: What the forward keeps for the backward, as bits.
KEEP_HIDDEN, KEEP_SCORES = 1, 2

#: Inputs whose gradients are those of `SHARED`; their values are never read.
ACCUMULATORS = ("core_accumulator", "key_accumulator", "value_accumulator")
_ACCUMULATED = dict(zip(ACCUMULATORS, SHARED, strict=True))
_AS_KNOWN_TO_BACKENDS = {**_ACCUMULATED, "memory": "core"}

_PLAIN = (Tensor, torch.nn.Parameter)

#: Arguments that may be trained.
_TRAINED = (*TENSORS[: TENSORS.index("residual") + 1], "memory")
_KEEPS_HIDDEN = BEHIND_PRE | {"value"}
_KEEPS_SCORES = BEHIND_SCORES | BEHIND_VISUAL | set(ACCUMULATORS)

#: x's dtype → key, value, gate and the biases of a quantized FFN, for one pass; nothing keeps them.
Dequantize = Callable[[torch.dtype], dict[str, Tensor | None]]

_Tensors = Mapping[str, Tensor | None]

#: x and the FFN's tensors, laid out as they were when it was prepared, to y.
Step = Callable[[Tensor, Mapping[str, Tensor | None]], Tensor]


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed, (1,) int64 on `device`, from PyTorch's default generator there.

    It stays on the device: no synchronization, and under CUDA graphs each replay draws another one.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def kept(tensors: _Tensors, recompute: bool, dequantize: bool = False) -> int:
    """Which of `KEEP_HIDDEN` and `KEEP_SCORES` the gradients that are required will read."""
    if recompute:
        return 0
    required = {name for name, t in tensors.items() if t is not None and t.requires_grad}
    hidden = (tensors["key"] is not None or dequantize) and not required.isdisjoint(_KEEPS_HIDDEN)
    scores = tensors["visual_key"] is not None and not required.isdisjoint(_KEEPS_SCORES)
    return KEEP_HIDDEN * hidden | KEEP_SCORES * scores


def join_memory(tensors: dict[str, Tensor | None]) -> None:
    """One tensor passed as visual_key and visual_value is one to autograd, `memory`: its gradient is summed before it is rounded."""
    key = tensors.get("visual_key")
    if key is not None and tensors["visual_value"] is key:
        tensors["memory"] = key
        tensors["visual_key"] = tensors["visual_value"] = None


def split_memory(tensors: dict[str, Tensor | None]) -> None:
    """The inverse of :func:`join_memory`."""
    if tensors.get("memory") is not None:
        tensors["visual_key"] = tensors["visual_value"] = tensors["memory"]


def _prepare(tensors: _Tensors, options: Options, training: bool) -> tuple[Problem, ModuleType]:
    """The problem and the backend that will compute it.

    Raises:
        ValueError: an index, a length or an offset out of range.
        RuntimeError: the backend was named and can't take this problem.
    """
    if any(tensors[name] is not None for name in INTEGERS):
        check_values(tensors)
    problem = normalize(tensors, options.scalars, options.autocast)
    module = choose(problem, options.backend, training=training)
    if _lacks_key(problem) and problem.rows:
        with without_autocast(problem.x.device, options.autocast):
            problem = with_key(problem)
    return problem, module


def _lacks_key(problem: Problem) -> bool:
    """Whether the problem has a feature map, and φ(Kv) is still to be formed."""
    return problem.visual_map is not None and problem.has_memory and problem.key_operand is None


def without_autocast(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """The problem's tensors are cast already; inside a backend every dtype is meant."""
    return nullcontext() if autocast is None else torch.autocast(device.type, enabled=False)


def _run(
    problem: Problem, module: ModuleType, options: Options, keep: int, shape: torch.Size
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y in x's shape, and what the backward keeps."""
    x = problem.x
    if x.shape[0] == 0:
        return x.new_empty(shape), None, None
    with without_autocast(x.device, options.autocast):
        y, pre, scores = module.forward(
            problem, save_hidden=bool(keep & KEEP_HIDDEN), save_scores=bool(keep & KEEP_SCORES)
        )
    # Not a view to autograd, which would refuse to change the output of a function in place.
    return torch.ops.aten._unsafe_view.default(y, shape), pre, scores


def run_forward(
    tensors: _Tensors, options: Options, keep: int, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward on real tensors: y like x, and what the backward keeps."""
    x = tensors["x"]
    assert x is not None
    problem, module = _prepare(tensors, options, training)
    return _run(problem, module, options, keep, x.shape)


def gradient_like(name: str, tensors: _Tensors) -> tuple[Tensor, torch.dtype]:
    """A tensor of the gradient's shape and device, and its dtype."""
    x = tensors["x"]
    argument = tensors["visual_key" if name in ("core_accumulator", "memory") else _ACCUMULATED.get(name, name)]
    assert x is not None and argument is not None
    return argument, torch.promote_types(x.dtype, torch.float32) if name in _ACCUMULATED else argument.dtype


def run_backward(
    grad: Tensor,
    tensors: _Tensors,
    options: Options,
    wanted: Sequence[str],
    sums: _Tensors | None = None,
    module: ModuleType | None = None,
) -> dict[str, Tensor]:
    """Backward on real tensors.

    Args:
        grad: of y.
        tensors: what the forward had, and its `pre` and `scores` where it kept them.
        wanted: names of `tensors`; `memory` for visual_key and visual_value in one; `ACCUMULATORS`, whose gradients are float32 at least.
        sums: by the names of `SHARED`, in that dtype and contiguous: what their gradients are added to, in place.
        module: the backend, where the forward has chosen it.

    Returns:
        The gradients by name, in the order of `wanted`; for an accumulator its sum where there is one.
    """
    problem = normalize(tensors, options.scalars, options.autocast)
    # An empty memory was dropped from the problem: its gradients are zeros.
    names = {name: _AS_KNOWN_TO_BACKENDS.get(name, name) for name in wanted}
    known = frozenset(n for n in names.values() if getattr(problem, n) is not None)
    given = {n: t for n, t in (sums or {}).items() if t is not None}
    grads: dict[str, Tensor] = {}
    if problem.rows and known:
        with without_autocast(grad.device, autocast_dtype(grad.device)):
            module = module or choose(problem, options.backend, training=True)
            flat = grad.resolve_neg().reshape(problem.rows, problem.width)
            keyless = _lacks_key(problem)
            needs = needs_of_backend(known) if keyless else known
            problem = with_key(problem) if keyless else problem
            grads = module.backward(problem, flat, tensors.get("pre"), tensors.get("scores"), needs, given)
            grads = with_key_gradients(problem, grads, known) if keyless else grads
    out = {}
    for name, known_as in names.items():
        like, dtype = gradient_like(name, tensors)
        found = grads.get(known_as, given.get(known_as))
        if found is None:
            out[name] = like.new_zeros(like.shape, dtype=dtype)
        else:
            out[name] = found.to(dtype).reshape(like.shape).contiguous()
    return out


def can_bypass_dispatcher(tensors: Collection[Tensor | None], training: bool) -> bool:
    """Whether no tracing, transform, subclass or dispatch mode has to see the call.

    Raises:
        RuntimeError: under a transform of torch.func that differentiates, or in forward mode.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    transforms = torch._C._functorch.get_interpreter_stack()
    if transforms is not None or forward_ad._current_level >= 0:
        _refuse_derivatives(tensors, training, transforms or ())
        return False
    return all(t is None or (type(t) in _PLAIN and not t.is_meta) for t in tensors)


def _refuse_derivatives(tensors: Collection[Tensor | None], training: bool, transforms: Sequence[Any]) -> None:
    """vmap has a rule; for the others PyTorch's own error would name internals of this package, or the tangent would be lost."""
    reverse = training and any(t.key() == torch._C._functorch.TransformType.Grad for t in transforms)
    forward = forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors)
    if reverse or forward:
        raise RuntimeError(
            "fused_ffn: wanted reverse-mode autograd, got torch.func.grad, vjp, jvp or forward-mode AD; its derivative is written for "
            "torch.autograd.grad and Tensor.backward, which torch.vmap may go round"
        )


def _has_tangent(t: Tensor | None) -> bool:
    if t is None or not t.is_floating_point():
        return False
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def call_directly(
    tensors: dict[str, Tensor | None], options: Options, dequantize: Dequantize | None = None
) -> tuple[Tensor, tuple[Tensor | None, ...]] | None:
    """A checked call without the dispatcher.

    Args:
        tensors: the arguments by name, and `ACCUMULATORS` for a memory that many calls read.
        options: of the call.
        dequantize: makes the frozen weights while the forward, and again the backward, runs; the dispatcher is bypassed then.

    Returns:
        y and, in training, the accumulators for the next call, where there were any; None where the dispatcher has to see the call.
    """
    every = tensors.values()
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in every)
    if dequantize is None and not can_bypass_dispatcher(every, training):
        return None
    x = tensors["x"]
    assert x is not None
    with torch.no_grad():
        problem, module = _prepare(_with_weights(tensors, dequantize), options, training)
    if problem.dropout_p > 0 and tensors["visual_key"] is not None:
        seed = draw_seed(x.device)
        tensors["seed"] = seed
        problem = problem if problem.visual_key is None else replace(problem, seed=seed)
    if not training:
        return _run(problem, module, options, 0, x.shape)[0], ()
    keep = kept(tensors, options.recompute, dequantize is not None)
    join_memory(tensors)
    names = (*(n for n in _TRAINED if tensors.get(n) is not None), *(n for n in ACCUMULATORS if n in tensors))
    trained = [tensors.pop(name) for name in names]
    call = _Call(problem, module, names, tensors, options, keep, dequantize)
    y, *accumulators = FusedFFN.apply(call, *trained)  # type: ignore[no-untyped-call]
    return y, tuple(accumulators)


def prepare_step(tensors: dict[str, Tensor | None], options: Options) -> Step | None:
    """A checked call of inference for any x and any FFN of its layout; None where the backend has no such form."""
    problem, module = _prepare(tensors, options, training=False)
    step: Step | None = module.prepare(problem) if hasattr(module, "prepare") else None
    return step


def _with_weights(tensors: dict[str, Tensor | None], dequantize: Dequantize | None) -> dict[str, Tensor | None]:
    if dequantize is None:
        return tensors
    x = tensors["x"]
    assert x is not None
    return {**tensors, **dequantize(x.dtype)}


@dataclass(frozen=True)
class _Call:
    """What a trained call is besides the tensors that may be trained.

    Attributes:
        problem: the forward's; not kept for the backward.
        module: the backend.
        names: of the tensors that may be trained, in their order, the accumulators last.
        fixed: the other tensors; not kept here for the backward either.
        options: of the call.
        keep: `KEEP_HIDDEN` and `KEEP_SCORES`.
        dequantize: as in :func:`call_directly`.
    """

    problem: Problem | None
    module: ModuleType
    names: tuple[str, ...]
    fixed: dict[str, Tensor | None]
    options: Options
    keep: int
    dequantize: Dequantize | None


class FusedFFN(torch.autograd.Function):
    """(y, *accumulators) from the tensors of `call.names`.

    Dequantized weights are not kept. An accumulator's gradient is the sum of the incoming one and this call's, written where the
    former lay.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *trained: Tensor | None) -> tuple[Tensor | None, ...]:
        assert call.problem is not None
        given = {**call.fixed, **dict(zip(call.names, trained, strict=True))}
        x = given["x"]
        assert x is not None
        y, pre, scores = _run(call.problem, call.module, call.options, call.keep, x.shape)
        # A residual's gradient is the output's own.
        saved = {**given, "residual": None, "pre": pre, "scores": scores} | dict.fromkeys(ACCUMULATORS)
        ctx.saved = tuple(name for name, t in saved.items() if t is not None)
        ctx.save_for_backward(*(t for t in saved.values() if t is not None))
        ctx.set_materialize_grads(False)
        ctx.call = replace(call, problem=None, fixed={})
        return y, *(t for name, t in zip(call.names, trained, strict=True) if name in ACCUMULATORS)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        names = ctx.call.names
        if grad is None:
            return None, *(None,) * (len(names) - len(incoming)), *incoming
        wants = dict(zip(names, ctx.needs_input_grad[1:], strict=True))
        # Under autocast it may be wider than y: autograd casts a gradient to the dtype of its input.
        residual = grad if wants.pop("residual", False) else None
        step = _Backward(ctx.call, ctx.saved, tuple(n for n, want in wants.items() if want), len(incoming))
        gradients = one_by_one(step.apply, (grad, *incoming, *ctx.saved_tensors))
        found = dict(zip(step.wanted, gradients, strict=True))
        return None, *(residual if name == "residual" else found.get(name) for name in names)


@dataclass(frozen=True)
class _Backward:
    """One backward besides its tensors, which are the gradient of y, those of the accumulators, and what was saved.

    Attributes:
        call: the forward's.
        saved: names of the saved tensors.
        wanted: names of the gradients.
        accumulators: how many there are.
    """

    call: _Call
    saved: tuple[str, ...]
    wanted: tuple[str, ...]
    accumulators: int

    def apply(self, *given: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients, recorded where autograd or a transform has to see them."""
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _Gradients.apply(self, *given)  # type: ignore[no-untyped-call]
        return self.run(*given)

    def run(self, *given: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients; those of the accumulators are written to."""
        call, (grad, *rest) = self.call, given
        assert grad is not None
        incoming, saved = rest[: self.accumulators], rest[self.accumulators :]
        tensors: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
        tensors.update(zip(self.saved, saved, strict=True))
        split_memory(tensors)
        tensors = _with_weights(tensors, call.dequantize)
        sums = dict(zip(SHARED, incoming, strict=False))
        return tuple(run_backward(grad, tensors, call.options, self.wanted, sums, call.module).values())


class _Gradients(torch.autograd.Function):
    """A backward that is itself recorded or batched: under create_graph its own derivative is refused, under vmap it runs once for each."""

    @staticmethod
    def forward(step: _Backward, *given: Tensor | None) -> tuple[Tensor, ...]:
        # Sums of their own: what came in stays as it is.
        grad, *rest = given
        sums = (t if t is None else t.clone() for t in rest[: step.accumulators])
        return step.run(grad, *sums, *rest[step.accumulators :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("fused_ffn has no second derivative: its backward can't be differentiated")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], step: _Backward, *given: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            _Gradients.apply(  # type: ignore[no-untyped-call]
                step,
                *(t if t is None or d is None else t.select(d, i) for t, d in zip(given, in_dims[1:], strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(step.wanted)
