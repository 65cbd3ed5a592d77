"""The activations and their derivatives on float32 blocks; the name is a compile-time constant.

NaN stays NaN, as in PyTorch. Neither tanh nor a difference of nearly equal numbers appears: tanh-GELU is z·σ(2u).
"""

import triton
import triton.language as tl

__all__ = ["activate", "activate_derivative", "sigmoid"]


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh_gelu_inner(z):
    """2u, where tanh-GELU is z (1 + tanh u) / 2 and u = √(2/π) (z + 0.044715 z³)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "relu":
        out = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        out = z * sigmoid(_tanh_gelu_inner(z))
    elif ACTIVATION == "silu":
        out = z * sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        out = z
    return out


@triton.jit
def activate_derivative(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)), which share most of their work."""
    if ACTIVATION == "relu":
        out = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        out = z * cumulative
        slope = cumulative + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(_tanh_gelu_inner(z))
        out = z * s
        slope = s + out * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        out = z * s
        slope = s + out * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        out = z
        slope = tl.full(z.shape, 1.0, z.dtype)
    return out, slope
