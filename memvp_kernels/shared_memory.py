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

from collections.abc import Mapping

import torch
from torch import Tensor

from memvp_kernels import torch_op as ops
from memvp_kernels.autograd import Call, FusedFFN, Restore, with_matrices
from memvp_kernels.checks import TENSORS, cast_dtype, check_scalars
from memvp_kernels.ffn import add_seed, autocast_of, check, unwatched

__all__ = ["Restore", "SharedMemory", "fused_ffn_shared"]

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
        return ops.run_forward(with_matrices(tensors, restore), scalars, 0, False, backend, autocast)[0]
    keep = 0
    if training and not recompute:
        through_hidden = tensors["key"] is not None and any(wants[:1] + wants[2:-4])
        keep |= ops.KEEP_HIDDEN * (wants[0] if restore is not None else through_hidden)
        keep |= ops.KEEP_SCORES * (wants[0] or any(wants[-3:]))
    if not direct:
        tensors.update(zip(ops.CARRIERS, memory.roots(caller), strict=True))
        return ops.forward_op(*ops.pack(tensors), *scalars.values(), keep, training, backend, autocast)[0]
    own = {name: tensors.pop(name) for name in _OWN}
    call = Call(_OWN, tensors, scalars, keep, backend, autocast, restore)
    y, *carriers = FusedFFN.apply(call, *own.values(), *carriers)  # type: ignore[no-untyped-call]
    memory.hand_on(caller, tuple(carriers))
    return y
