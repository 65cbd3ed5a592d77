"""A factored memory that many FFNs read: its operands are joined and cast once, and its gradient is summed once, in float32.

Left to autograd, every FFN would cast the memory, join [W; p^k] and [W; p^v], return a gradient of each part and add it to those of
the other FFNs: for LLaMA-7B a dozen passes over megabytes per layer. Instead each call hands gradient accumulators (tensors of which
only the gradient matters) to the next one, so that its backward receives the later calls' sum and its products add to that buffer.

To autograd this is a chain of ordinary functions. A second backward, gradients of a part of the inputs, calls that take no part and
exceptions need no special care, and the sums have the same bits every time. Under `torch.compile`, a dispatch mode or a subclass an
incoming gradient must not be written to: there each call returns a gradient of its own, and autograd adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memvp_kernels.autograd import (
    ACCUMULATORS,
    Dequantize,
    Step,
    call_directly,
    can_bypass_dispatcher,
    prepare_step,
    without_autocast,
)
from memvp_kernels.checks import TENSORS, autocast_dtype, cast_dtype, check
from memvp_kernels.dispatch import materializing_pays
from memvp_kernels.feature_map import key_of, mapped
from memvp_kernels.problem import contain, known_finite
from memvp_kernels.torch_op import call_op

__all__ = ["Dequantize", "SharedMemory", "fused_ffn_shared"]

_Accumulators = tuple[Tensor | None, ...]  # in the order of ACCUMULATORS; None where nothing is trained


def _layout(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.is_cpu)


class SharedMemory:
    """The memory of one forward, for :func:`fused_ffn_shared`.

    Args:
        core: (R, M, r), key and value in one.
        basis: (r, d).
        key_position, value_position: (M, d); or (calls, M, d), a pair for each caller.
        dtype: the one that most calls will need.
        visual_map: the operator's. φ(Kv) is then formed here, for all calls.
        finite: basis and positions are finite. In `dtype` a core that needs no gradient is then read where it lies, at every call.
        materialize: Kv and Vv (R, M, d) are formed here, and read by the calls for which that is cheaper on a CPU.
    """

    def __init__(
        self,
        core: Tensor,
        basis: Tensor,
        key_position: Tensor,
        value_position: Tensor,
        dtype: torch.dtype,
        *,
        visual_map: str | None = None,
        finite: bool = False,
        materialize: bool = False,
    ) -> None:
        self.visual_map, self._finite = visual_map, finite
        self._rank = basis.shape[0]
        self._layered = key_position.dim() == 3
        self._core = _wide(core)
        self._key, self._value = (_wide(_joined(basis, position)) for position in (key_position, value_position))
        # The backward of a slice for every caller would fill and add the whole of it for every caller.
        self._keys = self._key.unbind() if self._layered else (self._key,)
        self._values = self._value.unbind() if self._layered else (self._value,)
        if visual_map is not None:
            with without_autocast(core.device, autocast_dtype(core.device)):
                self._keys = tuple(self._mapped(self._core, key) for key in self._keys)
        self._operands = {(dtype, False): self._cast(dtype, False)}
        # A gradient of Kv and one of Vv, rounded to 16 bits each, may cancel where their sum does not.
        trained = self._core.requires_grad or self._key.requires_grad or self._value.requires_grad
        if self._layered or visual_map is not None or (trained and dtype.itemsize < 4):
            materialize = False
        self._materialized = self._materialize() if materialize else None
        self._open = True
        self._callers: set[int] = set()
        self._latest: _Accumulators | None = None
        self.steps: dict[tuple[Any, ...], Step] = {}
        self._plain: dict[torch.dtype, dict[str, Tensor]] = {}

    def _cast(self, dtype: torch.dtype, partial: bool) -> list[dict[str, Tensor]]:
        core, key, value = (t.detach().to(dtype) for t in (self._core, self._key, self._value))
        pairs = zip(key.unbind(), value.unbind(), strict=True) if self._layered else [(key, value)]
        found = [self._parts(core, key, value) for key, value in pairs]
        if partial and not (self._finite or core.numel() == 0 or known_finite(key, value)):
            found = [self._contained(parts) for parts in found]
        if self.visual_map is not None:
            # An image's own, so nothing of it is to be contained.
            found = [
                dict(parts, key_operand=key.detach().to(dtype)) for parts, key in zip(found, self._keys, strict=True)
            ]
        return found

    def _materialize(self) -> tuple[Tensor, Tensor]:
        """Kv and Vv (R, M, d) in float32 at least, which autograd takes back to the factors."""
        with without_autocast(self._core.device, autocast_dtype(self._core.device)):
            wide = torch.promote_types(self._core.dtype, torch.float32)
            core, key, value = (t.to(wide) for t in (self._core, self._key, self._value))
            product = core @ key[: self._rank]
            return product + key[self._rank :], product + value[self._rank :]

    def _mapped(self, core: Tensor, key: Tensor) -> Tensor:
        """φ(Kv) (R, M, d) in float32 at least, from [W; p^k]."""
        return mapped(key_of(core, key[: self._rank], key[self._rank :]))

    def _parts(self, core: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        return {
            "visual_key": core,
            "visual_value": core,
            "visual_basis": key[: self._rank],
            "key_position": key[self._rank :],
            "value_position": value[self._rank :],
            "key_operand": key,
            "value_operand": value,
        }

    def _contained(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        contained = contain(parts)
        core, basis, *positions = (
            contained[n] for n in ("visual_key", "visual_basis", "key_position", "value_position")
        )
        return self._parts(core, *(_joined(basis, position) for position in positions))

    def materialized(self, rows: int) -> bool:
        """Whether a call with that many rows reads Kv and Vv; in training all do, so that one gradient is summed."""
        if self._materialized is None:
            return False
        if torch.is_grad_enabled() and self._materialized[0].requires_grad:
            return True
        images, slots, rank = self._core.shape
        return materializing_pays(rows, images=images, slots=slots, rank=rank, width=self._key.shape[1])

    def operands(self, caller: int, dtype: torch.dtype, partial: bool, materialized: bool = False) -> dict[str, Tensor]:
        """The operator's arguments by name; [W; p] are (r + M, d) and contiguous, and their parts are views. φ(Kv) takes the place of [W; p^k].

        Args:
            caller: this FFN's position.
            dtype: x's.
            partial: some row may read no memory, which :func:`contain` is for.
            materialized: Kv and Vv, and nothing else.
        """
        if materialized:
            assert self._materialized is not None
            found = self._plain.get(dtype)
            if found is None:
                key, value = (t.detach().to(dtype) for t in self._materialized)
                found = {"visual_key": key, "visual_value": value, "key_operand": key, "value_operand": value}
                self._plain[dtype] = found
            return found
        parts = self._operands.get((dtype, partial))
        if parts is None:  # rows without an image, autocast inside the model, or sharding that casts
            parts = self._cast(dtype, partial)
            if not torch.compiler.is_compiling():
                self._operands[dtype, partial] = parts
        return parts[self.number(caller)]

    def number(self, caller: int) -> int:
        """Of the pair of positions that this FFN reads."""
        return caller if self._layered else 0

    def roots(self, caller: int, materialized: bool) -> _Accumulators:
        """The memory itself."""
        if materialized:
            assert self._materialized is not None
            return None, *(t if t.requires_grad else None for t in self._materialized)
        n = self.number(caller)
        return tuple(t if t.requires_grad else None for t in (self._core, self._keys[n], self._values[n]))

    def accumulators(self, caller: int, materialized: bool) -> _Accumulators:
        """The last call's; a caller that comes again, as under activation checkpointing, gets the roots."""
        roots = self.roots(caller, materialized)
        if self._latest is None or caller in self._callers:
            return roots
        return (self._latest[0], *roots[1:]) if self._layered else self._latest

    def keep(self, caller: int, accumulators: _Accumulators) -> None:
        """Keep the accumulators that a call returned for the next one."""
        if self._open and caller not in self._callers:
            self._callers.add(caller)
            self._latest = accumulators

    def close(self) -> None:
        """The forward is over; later calls are repetitions. Kept longer, the accumulators would hold the graph that holds this."""
        self._open, self._latest = False, None


def _wide(t: Tensor) -> Tensor:
    """Where a gradient is summed, in float32 at least: a sum has the dtype of the tensor that it belongs to."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.requires_grad else t


def _joined(basis: Tensor, position: Tensor) -> Tensor:
    if position.dim() == 3:
        basis = basis.expand(position.shape[0], -1, -1)
    return torch.cat([basis, position], dim=-2)


def _is_inference(x: object) -> bool:
    """Whether nothing but PyTorch's kernels on a CPU has to see a call."""
    if type(x) is not Tensor or not x.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return can_bypass_dispatcher((x,), False)


def fused_ffn_shared(
    x: Tensor,
    weights: Mapping[str, Tensor | None],
    memory: SharedMemory,
    caller: int,
    *,
    visual_index: Tensor | None,
    cu_seqlens: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str,
    visual_activation: str | None = None,
    visual_drop: float = 0.0,
    visual_scale: float,
    dropout_p: float,
    recompute: bool,
    backend: str,
    dequantize: Dequantize | None = None,
) -> Tensor:
    """:func:`memvp_kernels.fused_ffn` over a shared memory.

    Args:
        x, visual_index, cu_seqlens, residual, activation, visual_activation, visual_drop, visual_scale, dropout_p, recompute, backend:
            the operator's.
        weights: key, value, gate and the biases; none for the visual branch alone, or with `dequantize`.
        memory: of this forward.
        caller: this FFN's position among those that read the memory.
        dequantize: makes frozen weights, which exist only while the forward, and again the backward, runs; not under `torch.compile`
            or autocast.

    Returns:
        Like x.

    Raises:
        As the operator.
    """
    partial = visual_index is not None or cu_seqlens is not None
    call: tuple[Any, ...] | None = None
    if not partial and residual is None and dequantize is None and _is_inference(x):
        call = (
            *map(_layout, (x, *weights.values())), memory.number(caller), activation, visual_activation, visual_drop, visual_scale,
            dropout_p, backend,
        )  # fmt: skip
        step = memory.steps.get(call)
        if step is not None:
            return step(x, weights)
    tensors: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
    tensors.update(weights, x=x, residual=residual, visual_index=visual_index, cu_seqlens=cu_seqlens)
    materialized = False
    if isinstance(x, Tensor):
        materialized = memory.materialized(math.prod(x.shape[:-1]))
        dtype = cast_dtype("x", x.dtype, autocast_dtype(x.device))
        tensors.update(memory.operands(caller, dtype, partial, materialized))
    options = check(
        tensors, recompute=recompute, backend=backend, activation=activation, visual_activation=visual_activation,
        visual_map=memory.visual_map, visual_drop=visual_drop, visual_scale=visual_scale, dropout_p=dropout_p,
    )  # fmt: skip
    if call is not None:
        step = prepare_step(tensors, options)
        if step is not None:
            memory.steps[call] = step
            return step(x, weights)
    tensors.update(zip(ACCUMULATORS, memory.accumulators(caller, materialized), strict=True))
    out = call_directly(tensors, options, dequantize)
    if out is None:
        tensors.update(zip(ACCUMULATORS, memory.roots(caller, materialized), strict=True))
        return call_op(tensors, options)
    y, accumulators = out
    if accumulators:
        memory.keep(caller, accumulators)
    return y
