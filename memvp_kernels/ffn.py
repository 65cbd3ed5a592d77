"""`fused_ffn`, the operator: check the arguments, choose the road, run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memvp_kernels import torch_op as ops
from memvp_kernels.autograd import Call, FusedFFN
from memvp_kernels.checks import TENSORS, check_scalars, check_tensors
from memvp_kernels.dispatch import require
from memvp_kernels.philox import draw_seed

__all__ = ["add_seed", "autocast_of", "check", "fused_ffn", "unwatched"]

_PLAIN = (Tensor, torch.nn.Parameter)

#: What may be trained.
_TRAINED = TENSORS[: TENSORS.index("residual") + 1]
#: Whose gradient needs the pre-activations, and whose the scores.
_THROUGH_HIDDEN = ("x", "key", "value", "gate", "key_bias", "gate_bias")
_THROUGH_SCORES = ("x", "visual_key", "visual_value", "visual_basis", "key_position", "value_position")


def fused_ffn(
    x: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    visual_key: Tensor | None = None,
    visual_value: Tensor | None = None,
    *,
    visual_basis: Tensor | None = None,
    gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_position: Tensor | None = None,
    value_position: Tensor | None = None,
    activation: str = "silu",
    visual_activation: str | None = None,
    visual_scale: float = 1.0,
    dropout_p: float = 0.0,
    visual_lengths: Tensor | None = None,
    visual_index: Tensor | None = None,
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """An FFN whose key-value memory is extended by each sequence's image: act(x·[K;Kv]ᵀ)·[V;Vv], nothing concatenated.

    Memory-space visual prompting (Jie et al., ICML 2024, arXiv 2405.05615, section 3)::

        hidden = act(x Kᵀ + b_K)                    plain FFN (BART, T5 v1.0)
        hidden = act(x Gᵀ + b_G) ⊙ (x Kᵀ + b_K)     gated FFN (LLaMA, Mistral, Qwen, Gemma, T5 v1.1)
        visual = dropout(vact(x Kvᵀ))               per sequence; never gated, never normalised
        y      = hidden V + b_V + visual_scale · visual Vv [+ residual]

    with Kv = visual_key + key_position and Vv = visual_value + value_position. Under `visual_basis` W the memory is factored,
    Kv = A W + key_position: `visual_key` and `visual_value` are then cores A, every d-wide operand is shared by the batch, and the
    products are taken in the order (x Wᵀ) Aᵀ and (visual A) W. Sizes: S sequences of T tokens of width d, F key-value pairs, R
    memory rows (images) of M slots, rank r.

    Args:
        x: (S, T, d); or packed (N, d) with `cu_seqlens`; without memory per sequence any (…, d).
            float32, float16, bfloat16, or float64 (torch backend).
        key: (F, d), `up_proj.weight`, `fc1.weight` or `wi.weight`. With `value` = None too: the visual branch alone, for an FFN that
            runs elsewhere.
        value: (F, d), any strides: pass `down_proj.weight.T`, a view.
        visual_key: (R, M, d), one row of memory per image, or (M, d), shared by every sequence. Cores (R, M, r) or (M, r) under
            `visual_basis`.
        visual_value: the shape of `visual_key`, and possibly the same tensor.
        visual_basis: (r, d), the factored memory's basis.
        gate: (F, d), `gate_proj.weight`; None for a plain FFN.
        key_bias, gate_bias: (F,). value_bias: (d,).
        key_position, value_position: (M, d), added to every memory row.
        activation: "relu", "gelu" (erf), "gelu_tanh" or "silu".
        visual_activation: the same names; default: `activation`.
        visual_scale: s, a number.
        dropout_p: probability of dropping a visual activation, at every call with p > 0; the mask follows `torch.manual_seed`.
        visual_lengths: (R,) int32 or int64, the valid slots of each memory row, 0 to M; default M.
        visual_index: (S,) int32 or int64, the memory row that each sequence reads, -1 for none; default arange(S), which needs R == S.
        residual: like x, added to the result.
        cu_seqlens: (S + 1,) int32 or int64, for packed x: sequence i is x[cu_seqlens[i]:cu_seqlens[i + 1]].
        recompute: keep x instead of the pre-activations, and form them again in the backward.
        backend: "auto", "torch", "triton" or "cuda".

    Biases, memory, basis and positions may be wider than x (float32 under a half-precision base). Gradients flow to every
    floating-point tensor that requires them; a frozen one costs nothing. At most 2F + M values per token are kept for the backward.
    Under `torch.autocast` x, key, value, gate and residual are cast as `torch.nn.functional.linear` casts its operands; the backward
    casts them again, so that no 16-bit copy of a weight is kept. `torch.vmap` works, one call after the other.

    Returns:
        A contiguous tensor of x's shape and device, in x's dtype (autocast's under autocast). The same inputs give the same bits.

    Raises:
        TypeError: a dtype that doesn't fit, or not a tensor.
        ValueError: a shape, an unknown name, an argument without its partner, or (on a CPU, or with MEMVP_CHECK=1) an index, length or
            offset out of range. On a GPU values out of range mean "no memory", without a synchronisation.
        RuntimeError: a backend asked for by name that this machine or this input can't have, or a derivative asked of `torch.func` or
            of forward mode: it is written for `backward` and `torch.autograd.grad`.
    """
    check_scalars(activation, visual_activation, visual_scale, dropout_p, recompute, backend)
    tensors = {
        "x": x,
        "key": key,
        "value": value,
        "visual_key": visual_key,
        "visual_value": visual_value,
        "visual_basis": visual_basis,
        "gate": gate,
        "key_bias": key_bias,
        "gate_bias": gate_bias,
        "value_bias": value_bias,
        "key_position": key_position,
        "value_position": value_position,
        "residual": residual,
        "visual_lengths": visual_lengths,
        "visual_index": visual_index,
        "cu_seqlens": cu_seqlens,
    }
    autocast = autocast_of(x)
    check(tensors, backend, autocast)
    scalars = {
        "activation": activation,
        "visual_activation": visual_activation or activation,
        "visual_scale": visual_scale,
        "dropout_p": dropout_p,
    }
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    plain = unwatched(tensors.values(), training)
    add_seed(tensors, scalars, training, backend, autocast, admit=plain)
    if plain and not training:
        return ops.run_forward(tensors, scalars, 0, False, backend, autocast)[0]
    keep = 0
    if training and not recompute:
        keep |= ops.KEEP_HIDDEN * (key is not None and _requires_grad(tensors, _THROUGH_HIDDEN))
        keep |= ops.KEEP_SCORES * (visual_key is not None and _requires_grad(tensors, _THROUGH_SCORES))
    if plain:
        own = {name: tensors.pop(name) for name in _TRAINED if tensors[name] is not None}
        (y,) = FusedFFN.apply(Call(tuple(own), tensors, scalars, keep, backend, autocast), *own.values())  # type: ignore[no-untyped-call]
        return y
    return ops.forward_op(*ops.pack(tensors), *scalars.values(), keep, training, backend, autocast)[0]


def _requires_grad(tensors: dict[str, Tensor | None], names: tuple[str, ...]) -> bool:
    return any(t is not None and t.requires_grad for t in map(tensors.get, names))


def autocast_of(x: object) -> torch.dtype | None:
    """The dtype that autocast wants; None outside it, and for what is no tensor and is refused by the checks."""
    return ops.autocast_dtype(x.device) if isinstance(x, Tensor) else None


def check(tensors: dict[str, Tensor | None], backend: str, autocast: torch.dtype | None) -> None:
    """Raise what the arguments deserve before anything is done."""
    check_tensors(tensors, autocast)
    x = tensors["x"]
    assert x is not None
    require(backend, x.device)


def add_seed(
    tensors: dict[str, Tensor | None],
    scalars: dict[str, Any],
    training: bool,
    backend: str,
    autocast: torch.dtype | None,
    *,
    admit: bool,
) -> None:
    """Draw dropout's seed where there is something to drop.

    Args:
        admit: look at values and backend first, so that a refused call leaves the generator alone.
    """
    if scalars["dropout_p"] == 0 or tensors["visual_key"] is None:
        return
    if admit:
        ops.admit(tensors, scalars, training, backend, autocast)
    x = tensors["x"]
    assert x is not None
    tensors["seed"] = draw_seed(x.device)


def unwatched(tensors: Collection[Tensor | None], training: bool) -> bool:
    """Nobody is watching: no tracing, transform, subclass or dispatch mode, so the dispatcher would only cost time.

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
    """vmap has a rule; of the others PyTorch would speak in terms of this package's insides, or lose the tangent."""
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
