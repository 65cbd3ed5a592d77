"""`fused_ffn`, the operator: the arguments are checked, then the call runs directly or, where PyTorch has to see it, as a registered op."""

from __future__ import annotations

from torch import Tensor

from memvp_kernels.autograd import call_directly
from memvp_kernels.checks import check
from memvp_kernels.torch_op import call_op

__all__ = ["fused_ffn"]


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
    visual_map: str | None = None,
    visual_drop: float = 0.0,
    visual_scale: float = 1.0,
    dropout_p: float = 0.0,
    visual_lengths: Tensor | None = None,
    visual_index: Tensor | None = None,
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """An FFN whose key-value memory is extended by each sequence's image: act(x·[K;Kv]ᵀ)·[V;Vv], without concatenation.

    Memory-space visual prompting (Jie et al., ICML 2024, arXiv 2405.05615, section 3)::

        hidden = act(x Kᵀ + b_K)                    plain FFN (BART, T5 v1.0)
        hidden = act(x Gᵀ + b_G) ⊙ (x Kᵀ + b_K)     gated FFN (LLaMA, Mistral, Qwen, Gemma, T5 v1.1)
        visual = dropout(vact(x Kvᵀ))               per sequence; never gated, never normalized
        y      = hidden V + b_V + visual_scale · visual Vv [+ residual]

    with Kv = visual_key + key_position and Vv = visual_value + value_position. Under `visual_basis` W the memory is factored,
    Kv = A W + key_position: `visual_key` and `visual_value` are then cores A, every d-wide operand is shared by the batch, and the
    products are taken in the order (x Wᵀ) Aᵀ and (visual A) W. Sizes: S sequences of T tokens of width d, F key-value pairs, R
    memory rows (images) of M slots, rank r.

    Two methods that put an image into the FFN as well take another score: ADEM-VL (arXiv 2410.17779) maps both sides by φ and drops a
    token's lowest scores, MemVR (arXiv 2410.03577) takes the scores as they are, or their activation::

        scores = φ(x) φ(Kv)ᵀ                        visual_map; the FFN itself reads x
        visual = dropout(vact(scores) ⊙ [scores ≥ θ])

    θ is a token's own: the (int(visual_drop · m) + 1)-th lowest of its scores over the m valid slots of its image, as they are kept for
    the backward. Lower ones are zeroed, ties stay, and nothing is rescaled, in training and inference alike; to the gradient the mask is
    a constant. Under a φ the key of a factored memory is multiplied out, for each image; its values stay factored.

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
        visual_activation: the same names, or "identity"; default: `activation`.
        visual_map: φ of the visual scores, "silu" or None.
        visual_drop: the share of a token's slots to be zeroed, in [0, 1).
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
            offset out of range. On a GPU values out of range mean "no memory", without a synchronization.
        RuntimeError: a backend asked for by name that this machine or this input can't have, or a derivative asked of `torch.func` or
            of forward mode: it is written for `backward` and `torch.autograd.grad`.
    """
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
    options = check(
        tensors, recompute=recompute, backend=backend, activation=activation, visual_activation=visual_activation, visual_map=visual_map,
        visual_drop=visual_drop, visual_scale=visual_scale, dropout_p=dropout_p,
    )  # fmt: skip
    out = call_directly(tensors, options)
    return call_op(tensors, options) if out is None else out[0]
