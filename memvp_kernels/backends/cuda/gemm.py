"""Training and prefill on Hopper: the large products by csrc/hopper (TMA copies, wgmma, fused epilogues), the rest by the Triton backend.

Each step replaces the fused Triton kernel named in its docstring, argument for argument. An operand whose rows don't start at multiples of
16 bytes, sizes F or d that are no multiple of 8, and a memory per sequence go to that kernel: the step's fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memvp_kernels.backends.cuda import extension
from memvp_kernels.backends.triton import backward as triton_backward
from memvp_kernels.backends.triton import forward as triton_forward
from memvp_kernels.backends.triton.device.operands import TMA, TMA_TRANSPOSED
from memvp_kernels.backends.triton.device.visual import Visual
from memvp_kernels.backends.triton.gemm import GemmSteps
from memvp_kernels.backends.triton.kernels.dhidden import HiddenGradients, dhidden_backward, memory_backward
from memvp_kernels.backends.triton.kernels.dinput import dinput_backward
from memvp_kernels.backends.triton.kernels.hidden import Products, hidden_forward, memory_forward
from memvp_kernels.backends.triton.kernels.output import accumulate_memory, output_forward
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.problem import Problem, Segments

__all__ = ["STEPS", "backward", "dhidden", "dinput", "forward", "hidden", "output", "unsupported"]

_UNIT = 8  # numbers in 16 bytes
_TYPES = (torch.bfloat16, torch.float16)


def unsupported(problem: Problem) -> str | None:
    """Why these kernels can't take this problem here; None: they can."""
    x = problem.x
    if x.device.type != "cuda":
        return f"x is on {x.device}, and the extension's kernels need an NVIDIA GPU"
    limit = extension.hopper_limit(x.get_device())
    if limit is not None:
        return limit
    if x.dtype not in _TYPES:
        return f"x is {str(x.dtype).removeprefix('torch.')}, and the CUDA kernels compute in bfloat16 or float16"
    return None


def forward(problem: Problem, *, save_hidden: bool, save_scores: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the Triton backend's, by these steps."""
    return triton_forward(problem, save_hidden=save_hidden, save_scores=save_scores, steps=STEPS)


def backward(
    problem: Problem,
    grad: Tensor,
    pre: Tensor | None,
    scores: Tensor | None,
    needs: frozenset[str],
    sums: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """As the Triton backend's, by these steps."""
    return triton_backward(problem, grad, pre, scores, needs, sums, steps=STEPS)


def hidden(
    x: Tensor,
    key: Tensor | None,
    gate: Tensor | None,
    key_bias: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    memory: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    save_hidden: bool,
    save_scores: bool,
    need_hidden: bool = True,
) -> Products:
    """As `hidden_forward`."""
    shared = memory if memory is not None and visual is None and segments.shared else None
    weights = [w for w in (key, gate) if w is not None]
    matrices = [x, *weights] if shared is None else [x, *weights, shared[0]]
    if (key is None and shared is None) or not _takes(matrices, [] if key is None else [key.shape[0]]):
        return hidden_forward(
            x, key, gate, key_bias, gate_bias, activation, memory, segments, visual, save_hidden=save_hidden,
            save_scores=save_scores, need_hidden=need_hidden,
        )  # fmt: skip
    rows = x.shape[0]
    pairs = 0 if key is None else key.shape[0]
    gated = gate is not None
    stored = launch.empty_rows(rows, pairs, x) if key is not None and need_hidden else None
    pre = x.new_empty(1 + gated, rows, pairs) if key is not None and save_hidden else None
    columns = None if shared is None else launch.empty_rows(rows, shared.shape[1], x)
    biases = [_bias(b, x.dtype) for b in (key_bias, gate_bias)] if key is not None else [None, None]
    _launch(
        "hidden", x, pairs, [_Product(x, key, False)], activation=activation, gate=_matrix(gate), gated=gated,
        bias=_vector(biases[0]), gate_bias=_vector(biases[1]), result=_matrix(stored), pre=_address(pre), **_columns(shared, columns),
    )  # fmt: skip
    of_memory = Products(None, None, None, columns)
    if memory is not None and shared is None:
        of_memory = memory_forward(x, activation, memory, segments, visual, save_scores=save_scores)
    return Products(stored, pre, of_memory.visual, of_memory.scores)


def output(
    hidden: Tensor | None,
    value: Tensor | None,
    value_bias: Tensor | None,
    visual: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    residual: Tensor | None,
    like: Tensor,
) -> Tensor:
    """As `output_forward`."""
    pairs = [(hidden, value)] if hidden is not None and value is not None else []
    products = _products(pairs, visual, memory, segments)
    starts = [] if residual is None else [residual]
    if products is None or not _takes([p.left for p in products] + starts, [like.shape[1]]):
        return output_forward(hidden, value, value_bias, visual, memory, segments, residual, like)
    y = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    bias = _bias(value_bias, like.dtype)
    _launch("output", like, like.shape[1], products, bias=_vector(bias), residual=_matrix(residual), result=_matrix(y))
    return _add_memory(y, visual, memory, segments)


def dhidden(
    grad: Tensor,
    value: Tensor | None,
    pre: Tensor | None,
    activation: str,
    memory: Tensor | None,
    memories: int,
    scores: Tensor | None,
    segments: Segments,
    visual: Visual | None,
    *,
    need_visual: bool,
    overwrite: bool,
) -> HiddenGradients:
    """As `dhidden_backward`."""
    shared = memory if memory is not None and scores is None else None
    right = None if value is None else _right(value.T)
    matrices = [grad] if shared is None else [grad, shared[0]]
    unread = pre is None and shared is None
    if unread or (value is not None and right is None) or not _takes(matrices, [] if pre is None else [pre.shape[2]]):
        return dhidden_backward(
            grad, value, pre, activation, memory, memories, scores, segments, visual, need_visual=need_visual, overwrite=overwrite
        )  # fmt: skip
    rows = grad.shape[0]
    pairs = 0 if pre is None else pre.shape[2]
    dpre = pre if pre is None or overwrite else torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    columns = None if shared is None else launch.empty_rows(rows, shared.shape[1], grad)
    _launch(
        "dhidden", grad, pairs, [_Product(grad, *(right or (None, False)))], activation=activation,
        gated=pre is not None and pre.shape[0] == 2, pre=_address(pre), dpre=_address(dpre), **_columns(shared, columns),
    )  # fmt: skip
    of_memory = HiddenGradients(None, None, None, columns)
    if scores is not None:
        of_memory = memory_backward(
            grad, activation, memory, memories, scores, segments, visual, need_visual=need_visual
        )
    return HiddenGradients(dpre, of_memory.dscores, of_memory.visual, of_memory.columns)


def dinput(
    dpre: Tensor | None,
    key: Tensor | None,
    gate: Tensor | None,
    dscores: Tensor | None,
    memory: Tensor | None,
    segments: Segments,
    like: Tensor,
) -> Tensor:
    """As `dinput_backward`."""
    pairs = [(dpre[-1], key)] if dpre is not None and key is not None else []
    if dpre is not None and gate is not None:
        pairs.append((dpre[0], gate))
    products = _products(pairs, dscores, memory, segments)
    if products is None or not _takes([p.left for p in products], [like.shape[1]]):
        return dinput_backward(dpre, key, gate, dscores, memory, segments, like)
    dx = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _launch("output", like, like.shape[1], products, result=_matrix(dx))
    return _add_memory(dx, dscores, memory, segments)


STEPS = GemmSteps(hidden, output, dhidden, dinput)


class _Product(NamedTuple):
    """left (N, K) · right (K, columns), whose `across` form has contiguous rows; else right is its transpose, (columns, K) with such rows."""

    left: Tensor
    right: Tensor | None
    across: bool


def _right(matrix: Tensor) -> tuple[Tensor, bool] | None:
    """The right operand (K, columns) of a product as (what has contiguous rows, across); None: neither it nor its transpose has."""
    form = tma.load_mode(matrix)
    if form == TMA.value:
        return matrix, True
    return (matrix.T, False) if form == TMA_TRANSPOSED.value else None


def _products(
    pairs: list[tuple[Tensor, Tensor]], left: Tensor | None, memory: Tensor | None, segments: Segments
) -> list[_Product] | None:
    """The terms of one sum, with a memory that all rows share; None where there is none, or one that the kernel can't read."""
    if left is not None and memory is not None and segments.shared:
        pairs = [*pairs, (left, memory[0])]
    rights = [_right(right) for _, right in pairs]
    if not pairs or None in rights:
        return None
    return [_Product(pair[0], *right) for pair, right in zip(pairs, rights, strict=True) if right is not None]


def _takes(matrices: list[Tensor], sizes: list[int]) -> bool:
    """Whether the kernels can copy these matrices by 16 bytes; sizes: columns of what they store without padding."""
    return all(size % _UNIT == 0 for size in sizes) and all(map(tma.supports_tma, matrices))


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias as the kernel reads it: contiguous, in x's dtype or float32, and 4-byte aligned."""
    if bias is None:
        return None
    bias = bias.contiguous() if bias.dtype in (dtype, torch.float32) else bias.to(torch.float32)
    return bias if bias.data_ptr() % 4 == 0 else bias.clone()


def _add_memory(y: Tensor, left: Tensor | None, memory: Tensor | None, segments: Segments) -> Tensor:
    """Add left · memory to y in place, where each sequence reads a memory of its own."""
    if left is None or memory is None or segments.shared:
        return y
    return accumulate_memory(y, left, memory, segments)


def _columns(shared: Tensor | None, columns: Tensor | None) -> dict[str, Any]:
    """The arguments for the columns of a memory (1, M, d) that all rows share."""
    if shared is None:
        return {}
    return {"shared": _matrix(shared[0]), "shared_result": _matrix(columns), "shared_columns": shared.shape[1]}


def _matrix(matrix: Tensor | None) -> tuple[int, int] | None:
    return None if matrix is None else (matrix.data_ptr(), matrix.stride(0))


def _vector(vector: Tensor | None) -> tuple[int, bool] | None:
    return None if vector is None else (vector.data_ptr(), vector.dtype == torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    kind: str, x: Tensor, columns: int, products: list[_Product], *, activation: str = "silu", **options: Any
) -> None:
    """One launch on x's device and its current stream; options: the rest of `_C.gemm`'s arguments."""
    built = extension.load()
    assert built is not None, "dispatch asked unsupported() first"
    device = x.device
    built.gemm(
        kind=built.gemm_codes[kind], type=built.type_codes[str(x.dtype).removeprefix("torch.")],
        activation=built.activation_codes[activation], rows=x.shape[0], columns=columns,
        products=tuple((_matrix(p.left), _matrix(p.right), p.left.shape[1], p.across) for p in products),
        multiprocessors=launch.chip(device).multiprocessors, device=x.get_device(),
        stream=torch.cuda.current_stream(device).cuda_stream, **options,
    )  # fmt: skip
