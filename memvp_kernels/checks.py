"""Checks of :func:`memvp_kernels.fused_ffn`'s arguments.

Each error says the argument, what was wanted, what was given and the way out, and is raised before any work is done. Names, dtypes
and shapes are checked at every call; values of integer tensors only where they can be read without a synchronization.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "FEATURE_MAPS",
    "IDENTITY",
    "INTEGERS",
    "SCALARS",
    "TENSORS",
    "Options",
    "autocast_dtype",
    "cast_dtype",
    "check",
    "check_scalars",
    "check_tensors",
]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
#: A visual activation that is none.
IDENTITY = "identity"
FEATURE_MAPS = ("silu",)
BACKENDS = ("auto", "torch", "triton", "cuda")

#: What `check_scalars` returns, in this order.
SCALARS = ("activation", "visual_activation", "visual_map", "visual_drop", "visual_scale", "dropout_p")

#: Every tensor argument in the operator's order; those up to residual may be differentiated.
TENSORS = (
    "x", "key", "value", "visual_key", "visual_value", "visual_basis", "gate", "key_bias", "gate_bias", "value_bias",
    "key_position", "value_position", "residual", "visual_lengths", "visual_index", "cu_seqlens",
)  # fmt: skip
_WEIGHTS = ("key", "value", "gate", "residual")
_WIDER = (
    "visual_key",
    "visual_value",
    "visual_basis",
    "key_bias",
    "gate_bias",
    "value_bias",
    "key_position",
    "value_position",
)
INTEGERS = ("visual_lengths", "visual_index", "cu_seqlens")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NEEDS = {
    "key": "value",
    "value": "key",
    "gate": "key",
    "key_bias": "key",
    "gate_bias": "gate",
    "value_bias": "value",
    "visual_key": "visual_value",
    "visual_value": "visual_key",
    "visual_basis": "visual_key",
    "key_position": "visual_key",
    "value_position": "visual_key",
    "visual_lengths": "visual_key",
    "visual_index": "visual_key",
}

Tensors = Mapping[str, Tensor | None]


def _got(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _wrong_shape(name: str, wanted: str, t: Tensor, way_out: str) -> ValueError:
    return ValueError(f"{name}: wanted shape {wanted}, got {_got(t)}; {way_out}")


class Options(NamedTuple):
    """What a checked call is besides its tensors.

    Attributes:
        scalars: names and numbers, those of `SCALARS`.
        recompute: keep nothing for the backward that it can compute again.
        backend: as asked for.
        autocast: the dtype that autocast casts to; None outside it.
    """

    scalars: dict[str, Any]
    recompute: bool
    backend: str
    autocast: torch.dtype | None


def check(tensors: Tensors, *, recompute: bool, backend: str, **scalars: Any) -> Options:
    """Everything about a call that needs no value of a tensor.

    Args:
        scalars: the arguments of :func:`check_scalars`.

    Raises:
        TypeError, ValueError: as `check_scalars` and `check_tensors`, or of `recompute` and `backend`.
    """
    checked = check_scalars(**scalars)
    if backend not in BACKENDS:
        raise ValueError(
            f"backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}; 'auto' takes the fastest that this machine has"
        )
    if not isinstance(recompute, bool):
        raise TypeError(
            f"recompute: wanted a bool, got {type(recompute).__name__}; True keeps x instead of the pre-activations"
        )
    x = tensors["x"]
    autocast = autocast_dtype(x.device) if isinstance(x, Tensor) else None
    check_tensors(tensors, autocast)
    return Options(checked, recompute, backend, autocast)


def check_scalars(
    *,
    activation: str,
    visual_activation: str | None,
    visual_map: str | None,
    visual_drop: float,
    visual_scale: float,
    dropout_p: float,
) -> dict[str, Any]:
    """The arguments by name, numbers as Python's own, as :class:`memvp_kernels.problem.Problem` takes them.

    Raises:
        TypeError: a number of another type.
        ValueError: an unknown name, or a probability or share out of its range.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: wanted one of {', '.join(ACTIVATIONS)}, got {activation!r}; 'gelu' is the erf form, 'gelu_tanh' its approximation"
        )
    if visual_activation is not None and visual_activation not in (*ACTIVATIONS, IDENTITY):
        raise ValueError(
            f"visual_activation: wanted one of {', '.join(ACTIVATIONS)}, {IDENTITY}, got {visual_activation!r}; None takes activation"
        )
    if visual_map is not None and visual_map not in FEATURE_MAPS:
        raise ValueError(
            f"visual_map: wanted None or {', '.join(map(repr, FEATURE_MAPS))}, got {visual_map!r}; None takes x and the memory as they are"
        )
    share = _number("visual_drop", visual_drop, "a share of the slots")
    if not 0.0 <= share < 1.0:
        raise ValueError(f"visual_drop: wanted a share in [0, 1), got {visual_drop}; 0.0 drops nothing")
    scale = _number("visual_scale", visual_scale, "a trainable scale belongs into visual_value")
    probability = _number("dropout_p", dropout_p, "a probability")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"dropout_p: wanted a probability in [0, 1], got {dropout_p}; 0.0 drops nothing")
    return {
        "activation": activation,
        "visual_activation": visual_activation or activation,
        "visual_map": visual_map,
        "visual_drop": share,
        "visual_scale": scale,
        "dropout_p": probability,
    }


def _number(argument: str, number: Any, way_out: str) -> float:
    """A Python float, from whatever `float` takes but text and tensors."""
    if isinstance(number, (torch.SymFloat, torch.SymInt)):
        return number  # type: ignore[return-value]
    real = not isinstance(number, (Tensor, str, bytes)) and (
        isinstance(number, numbers.Real) or not isinstance(number, numbers.Complex)
    )
    try:
        if real:
            return float(number)
    except OverflowError:
        raise ValueError(f"{argument}: wanted a number that fits a float, got {number}; scale visual_value") from None
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{argument}: wanted a Python number, got {type(number).__name__}; {way_out}")


# Asked once: torch.compile of PyTorch 2.10 and 2.11 can't trace the question.
_HAVE_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None outside it, and on a device that has no autocast (meta)."""
    kind = device.type
    if kind not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast_dtype(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype that argument `name` computes in under autocast (None: outside it).

    As autocast casts the operands of a linear layer, except that wider biases and memory stay wide, as the contract allows.
    """
    if autocast is None or not dtype.is_floating_point or dtype in (autocast, torch.float64):
        return dtype
    return autocast if dtype != torch.float32 or name == "x" or name in _WEIGHTS else dtype


def check_tensors(tensors: Tensors, autocast: torch.dtype | None = None) -> None:
    """Presence, types, devices and shapes; values are read nowhere, so this traces and never synchronizes.

    Args:
        autocast: dtypes are judged as `cast_dtype` leaves them, before anything is cast.

    Raises:
        TypeError: not a tensor, or a dtype that doesn't fit.
        ValueError: a shape or device that doesn't fit, or an argument whose partner is missing.
    """
    _check_types(tensors, autocast)
    for name, partner in _NEEDS.items():
        if tensors[name] is not None and tensors[partner] is None:
            raise ValueError(f"{name}: needs {partner}, got {partner}=None; pass both or neither")
    if tensors["key"] is None and tensors["visual_key"] is None:
        raise ValueError(
            "key: wanted an FFN (key and value), a memory (visual_key and visual_value) or both, got neither; there is nothing to compute"
        )
    x = tensors["x"]
    assert x is not None
    if x.dim() == 0:
        raise _wrong_shape("x", "(S, T, d), (N, d) or (…, d)", x, "the last dimension is the model's width")
    _check_weights(x, tensors)
    sequences = _check_packing(x, tensors["cu_seqlens"])
    if tensors["visual_key"] is not None:
        _check_memory(x, tensors, sequences)


def _check_types(tensors: Tensors, autocast: torch.dtype | None) -> None:
    x = tensors["x"]
    if not isinstance(x, Tensor):
        raise TypeError(f"x: wanted a torch.Tensor, got {type(x).__name__}; torch.as_tensor makes one")
    dtype, device = cast_dtype("x", x.dtype, autocast), x.device
    if dtype not in _FLOATING:
        raise TypeError(f"x: wanted float32, float16, bfloat16 or float64, got {_got(x)}; cast it first")
    for name, t in tensors.items():
        if t is None or t is x:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: wanted a torch.Tensor or None, got {type(t).__name__}; torch.as_tensor makes one")
        if t.device != device:
            raise ValueError(
                f"{name}: wanted a tensor on x's device {device}, got {_got(t)}; move it with .to(x.device)"
            )
        own = cast_dtype(name, t.dtype, autocast)
        if own == dtype and name not in INTEGERS:
            continue
        if name in INTEGERS:
            if t.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: wanted int32 or int64, got {_got(t)}; cast it with .int()")
        elif name in _WEIGHTS:
            raise TypeError(f"{name}: wanted x's dtype {dtype}, got {_got(t)}; cast one of them, or use torch.autocast")
        elif name in _WIDER and not (own in (torch.float32, torch.float64) and own.itemsize > dtype.itemsize):
            raise TypeError(
                f"{name}: wanted x's dtype {dtype} or a wider one, got {_got(t)}; cast it with .to(x.dtype)"
            )


def _check_weights(x: Tensor, tensors: Tensors) -> None:
    key, d = tensors["key"], x.shape[-1]
    if key is not None:
        if key.dim() != 2 or key.shape[1] != d:
            raise _wrong_shape(
                "key", f"(F, {d}) with x's width", key, "pass up_proj.weight, fc1.weight or wi.weight as it is"
            )
        pairs = key.shape[0]
        for name in ("value", "gate"):
            t = tensors[name]
            if t is not None and (t.dim() != 2 or t.shape[0] != pairs or t.shape[1] != d):
                hint = "pass down_proj.weight.T, a view" if name == "value" else "pass gate_proj.weight as it is"
                raise _wrong_shape(name, f"({pairs}, {d}) like key", t, hint)
        for name, size in (("key_bias", pairs), ("gate_bias", pairs), ("value_bias", d)):
            t = tensors[name]
            if t is not None and (t.dim() != 1 or t.shape[0] != size):
                raise _wrong_shape(
                    name,
                    f"({size},)",
                    t,
                    "one number per " + ("column of the output" if name == "value_bias" else "key-value pair"),
                )
    residual = tensors["residual"]
    if residual is not None and residual.shape != x.shape:
        raise _wrong_shape(
            "residual", f"{tuple(x.shape)} like x", residual, "expand it first if it is meant to broadcast"
        )


def _check_packing(x: Tensor, cu_seqlens: Tensor | None) -> int | None:
    """S where x has sequences: packed, or three-dimensional."""
    if cu_seqlens is None:
        return x.shape[0] if x.dim() == 3 else None
    if x.dim() != 2:
        raise ValueError(
            f"cu_seqlens: wanted a packed x (N, d) with it, got x {_got(x)}; leave it out for a padded x, or flatten x to rows"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise _wrong_shape("cu_seqlens", "(S + 1,)", cu_seqlens, "it starts at 0 and ends at N")
    return cu_seqlens.shape[0] - 1


def _check_memory(x: Tensor, tensors: Tensors, sequences: int | None) -> None:
    key, value, basis = tensors["visual_key"], tensors["visual_value"], tensors["visual_basis"]
    assert key is not None and value is not None
    d = x.shape[-1]
    if basis is not None:
        if basis.dim() != 2 or basis.shape[1] != d:
            raise _wrong_shape(
                "visual_basis",
                f"(r, {d}) with x's width",
                basis,
                "its rows are the factors' directions, shared by all images",
            )
        width, form = basis.shape[0], "cores (R, M, r) or (M, r) under visual_basis"
    else:
        width, form = d, "(R, M, d) or (M, d)"
    if key.dim() not in (2, 3) or key.shape[-1] != width:
        raise _wrong_shape(
            "visual_key",
            f"{form} with last dimension {width}",
            key,
            "or pass visual_basis for a factored memory" if basis is None else "as wide as visual_basis has rows",
        )
    if value.shape != key.shape:
        raise _wrong_shape(
            "visual_value", f"{tuple(key.shape)} like visual_key", value, "the two may be the same tensor"
        )
    slots = key.shape[-2]
    for name in ("key_position", "value_position"):
        t = tensors[name]
        if t is not None and (t.dim() != 2 or t.shape[0] != slots or t.shape[1] != d):
            raise _wrong_shape(
                name,
                f"({slots}, {d}), one row per slot",
                t,
                "squeeze the leading dimension of a checkpoint's (1, M, d)",
            )
    memories = key.shape[0] if key.dim() == 3 else 1
    lengths, index = tensors["visual_lengths"], tensors["visual_index"]
    if lengths is not None and (lengths.dim() != 1 or lengths.shape[0] != memories):
        raise _wrong_shape(
            "visual_lengths", f"({memories},), one per memory row", lengths, "it counts valid slots, 0 to M"
        )
    if sequences is None and (key.dim() == 3 or index is not None):
        name = "visual_index" if key.dim() == 2 else "visual_key"
        raise ValueError(
            f"{name}: memory per sequence needs sequences in x, (S, T, d) or (N, d) with cu_seqlens, got x {_got(x)}; or pass one (M, ·) memory for all rows"
        )
    if index is not None:
        if index.dim() != 1 or index.shape[0] != sequences:
            raise _wrong_shape(
                "visual_index",
                f"({sequences},), one per sequence",
                index,
                "it names the memory row of each sequence, -1 for none",
            )
    elif key.dim() == 3 and memories != sequences:
        raise _wrong_shape(
            "visual_key",
            f"({sequences}, M, ·), one memory row per sequence",
            key,
            "or say with visual_index which row each sequence reads",
        )
