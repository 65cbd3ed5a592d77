"""A factored memory that many FFNs read: its operands formed once, and its gradient summed where the products leave it.

Left to autograd, every FFN casts the memory and joins [W; p^k] and [W; p^v] anew, returns a gradient of each part, and adds it to
those of the other FFNs: for LLaMA-7B a dozen passes over megabytes per layer. Here the parts are joined and cast once. The gradient
goes from call to call instead of to one place: each call hands the memory's carriers (tensors of which only the gradient matters) to
the next one, so that on the way back it is given the sum of the later calls, and its products add to that buffer (beta = 1 of a matrix
product). To autograd this is a chain of ordinary functions, which is why it holds for a second backward, for gradients of a part of
the inputs, for calls that take no part, and after an exception: nothing outlives a backward. Calls run backward in the one order that the
chain leaves, so the sums have the same bits every time.

Where PyTorch traces (`torch.compile`) or watches (a dispatch mode, a subclass), writing into an incoming gradient is not allowed: there
every call is given the first carriers, returns a gradient of its own, and autograd adds. Up to rounding the numbers are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memvp_kernels import ops
from memvp_kernels.arguments import TENSORS, cast_dtype, check_scalars
from memvp_kernels.ffn import add_seed, autocast_of, check, unwatched
from memvp_kernels.problem import SHARED

__all__ = ["Restore", "SharedMemory", "fused_ffn_shared"]

#: x's dtype → key, value, gate and the biases, made for one pass and kept by nobody.
Restore = Callable[[torch.dtype], dict[str, Tensor | None]]

_FFN = ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")
_OWN = ("x", "residual", *_FFN)
_Carriers = tuple[Tensor | None, ...]  # in the order of ops.CARRIERS; None where nothing is trained


class SharedMemory:
    """One forward's memory, read by :func:`fused_ffn_shared`.

    Args:
        core: (R, M, r), key and value in one.
        basis: (r, d).
        key_position, value_position: (M, d); or (calls, M, d), a pair for each caller.
        dtype: that most callers will ask for.
    """

    def __init__(
        self, core: Tensor, basis: Tensor, key_position: Tensor, value_position: Tensor, dtype: torch.dtype
    ) -> None:
        self._rank = basis.shape[0]
        self._layered = key_position.dim() == 3
        self._core = core
        self._key, self._value = _joined(basis, key_position), _joined(basis, value_position)
        # unbind: a slice for every caller would, backward, fill and add the whole of it for every caller
        self._keys = self._key.unbind() if self._layered else (self._key,)
        self._values = self._value.unbind() if self._layered else (self._value,)
        self._narrow = {dtype: self._cast(dtype)}
        self._open = True
        self._callers: set[int] = set()
        self._latest: _Carriers | None = None

    def _cast(self, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        core, key, value = (t.detach().to(dtype) for t in (self._core, self._key, self._value))
        pairs = zip(key.unbind(), value.unbind(), strict=True) if self._layered else [(key, value)]
        return [
            {
                "visual_key": core,
                "visual_value": core,
                "visual_basis": key[: self._rank],
                "key_position": key[self._rank :],
                "value_position": value[self._rank :],
                "key_operand": key,
                "value_operand": value,
            }
            for key, value in pairs
        ]

    def operands(self, caller: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the operator reads, by its names; [W; p] are (r + M, d) and contiguous, their parts are views."""
        found = self._narrow.get(dtype)
        if found is None:  # autocast inside the model, or sharding that casts
            found = self._cast(dtype)
            if not torch.compiler.is_compiling():
                self._narrow[dtype] = found
        return found[caller if self._layered else 0]

    def roots(self, caller: int) -> _Carriers:
        """The memory itself."""
        n = caller if self._layered else 0
        return tuple(t if t.requires_grad else None for t in (self._core, self._keys[n], self._values[n]))

    def carriers(self, caller: int) -> _Carriers:
        """What the last caller handed on; a caller that comes again, as under activation checkpointing, gets the roots."""
        roots = self.roots(caller)
        if self._latest is None or caller in self._callers:
            return roots
        return (self._latest[0], *roots[1:]) if self._layered else self._latest

    def hand_on(self, caller: int, carriers: _Carriers) -> None:
        """Keep what the caller's function made of its carriers, for the next one."""
        if self._open and caller not in self._callers:
            self._callers.add(caller)
            self._latest = carriers

    def close(self) -> None:
        """The forward is over; whoever comes now repeats a call. Kept longer, the carriers would hold the graph that holds this."""
        self._open, self._latest = False, None


def _joined(basis: Tensor, position: Tensor) -> Tensor:
    if position.dim() == 3:
        basis = basis.expand(position.shape[0], -1, -1)
    return torch.cat([basis, position], dim=-2)


def fused_ffn_shared(
    x: Tensor,
    weights: Mapping[str, Tensor | None],
    memory: SharedMemory,
    caller: int,
    *,
    visual_index: Tensor | None,
    residual: Tensor | None = None,
    activation: str,
    visual_scale: float,
    dropout_p: float,
    recompute: bool,
    backend: str,
    restore: Restore | None = None,
) -> Tensor:
    """:func:`memvp_kernels.fused_ffn` over a shared memory.

    Args:
        x, visual_index, residual, activation, visual_scale, dropout_p, recompute, backend: the operator's.
        weights: key, value, gate and the biases; none for the visual branch alone, or with `restore`.
        memory: of this forward.
        caller: this FFN's position among those that read the memory.
        restore: makes frozen weights, which exist only while the forward, and again the backward, runs; not under `torch.compile` or
            autocast.

    Returns:
        Like x.

    Raises:
        As the operator.
    """
    check_scalars(activation, None, visual_scale, dropout_p, recompute, backend)
    tensors: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    tensors.update(weights, x=x, residual=residual, visual_index=visual_index)
    autocast = autocast_of(x)
    if isinstance(x, Tensor):
        tensors.update(memory.operands(caller, cast_dtype("x", x.dtype, autocast)))
    check(tensors, backend, autocast)
    scalars = {
        "activation": activation,
        "visual_activation": activation,
        "visual_scale": visual_scale,
        "dropout_p": dropout_p,
    }
    carriers = memory.carriers(caller)
    wants = [t is not None and t.requires_grad for t in (*map(tensors.get, _OWN), *carriers)]
    training = torch.is_grad_enabled() and any(wants)
    direct = restore is not None or unwatched((*tensors.values(), *carriers), training)
    add_seed(tensors, scalars, training, backend, autocast, admit=direct and restore is None)
    if direct and not training:
        return ops.run_forward(_with_matrices(tensors, restore), scalars, 0, False, backend, autocast)[0]
    keep = 0
    if training and not recompute:
        through_hidden = tensors["key"] is not None and any(wants[:1] + wants[2:-4])
        keep |= ops.KEEP_HIDDEN * (wants[0] if restore is not None else through_hidden)
        keep |= ops.KEEP_SCORES * (wants[0] or any(wants[-3:]))
    if not direct:
        tensors.update(zip(ops.CARRIERS, memory.roots(caller), strict=True))
        return ops.forward_op(*ops.pack(tensors), *scalars.values(), keep, training, backend, autocast)[0]
    own = {name: tensors.pop(name) for name in _OWN}
    call = _Call(tensors, scalars, keep, backend, autocast, restore)
    y, *carriers = _Chained.apply(call, *own.values(), *carriers)  # type: ignore[no-untyped-call]
    memory.hand_on(caller, tuple(carriers))
    return y


def _with_matrices(tensors: dict[str, Tensor | None], restore: Restore | None) -> dict[str, Tensor | None]:
    x = tensors["x"]
    assert x is not None
    return tensors if restore is None else {**tensors, **restore(x.dtype)}


class _Call(NamedTuple):
    """What a call is besides the tensors that may be trained."""

    fixed: dict[str, Tensor | None]
    scalars: dict[str, Any]
    keep: int
    backend: str
    autocast: torch.dtype | None
    restore: Restore | None


class _Chained(torch.autograd.Function):
    """(y, carriers) from the arguments of `_OWN` and the carriers; keeps what the registered op keeps, but for restored matrices."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *trained: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {**call.fixed, **dict(zip(_OWN, trained, strict=False))}
        y, pre, scores = ops.run_forward(
            _with_matrices(given, call.restore), call.scalars, call.keep, True, call.backend, call.autocast
        )
        kept, ctx.present = ops.pack({**given, "residual": None, "pre": pre, "scores": scores})
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.call = call._replace(fixed={})
        return y, *trained[len(_OWN) :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _Chained._gradients(ctx, grad, incoming)
        with torch.no_grad():
            found = _Chained._gradients(ctx, grad, tuple(t if t is None else t.detach() for t in incoming))
        refused = iter(_Refused.apply(torch.empty(0, requires_grad=True), *(t for t in found if t is not None)))  # type: ignore[no-untyped-call]
        return tuple(t if t is None else next(refused) for t in found)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor | None, incoming: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if grad is None:
            return None, *(None,) * len(_OWN), *incoming
        tensors = _with_matrices(ops.unpack(ctx.saved_tensors, ctx.present), call.restore)
        names = (*_OWN, *ops.CARRIERS)
        wanted = [name for name, wants in zip(names, ctx.needs_input_grad[1:], strict=True) if wants]
        # Made by the next call's backward and for this one alone, so it may be written to.
        sums = {name: t for name, t in zip(SHARED, incoming, strict=True) if t is not None}
        found = ops.run_backward(
            grad, tensors, call.scalars, [n for n in wanted if n != "residual"], call.backend, call.autocast, sums
        )
        if "residual" in wanted:
            found["residual"] = grad
        return None, *map(found.get, names)


class _Refused(torch.autograd.Function):
    """Gradients under create_graph: fine to have, but the backward's own derivative is not known."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("fused_ffn has no second derivative: its backward can't be differentiated")
