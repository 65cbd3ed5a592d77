"""What each backend should cost, in seconds: FLOPs, bytes and launches over the chip's rates. Decides "auto"; nothing is timed.

The rates are data-sheet peaks, the efficiencies assumptions (published rates of comparable kernels, not measurements of ours), and
only the order of the predictions matters: it is the same on every rank and in every run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from memvp_kernels.precision import tf32_allowed
from memvp_kernels.problem import Problem

__all__ = ["Rates", "Sizes", "fastest", "predict", "rates_of", "sizes_of"]


@dataclass(frozen=True, eq=False)  # one object per chip, so that it hashes fast as a key
class Rates:
    """Peaks of one GPU: FLOP per second on tensor cores in 16 bits (dense), outside them in float32, and bytes per second."""

    tensor: float
    cuda: float
    memory: float


_RATES = {
    80: Rates(312e12, 19.5e12, 1.9e12),
    86: Rates(150e12, 38e12, 0.8e12),
    89: Rates(330e12, 83e12, 1.0e12),
    90: Rates(989e12, 67e12, 4.0e12),
    100: Rates(2250e12, 80e12, 7.5e12),
    120: Rates(420e12, 105e12, 1.7e12),
}
#: Share of the arithmetic peak that large products reach, by road. "fused" and "library" are the Triton backend's two: its own pipelined
#: products, and cuBLAS's between its passes; in IEEE float32 `tl.dot` is a loop of FMAs without cuBLAS's register blocking. The decode
#: kernel is built for bandwidth, not for FLOPs: its tensor-core work is bound by shared memory (docs/notes/decode-account.md), below the
#: weights' own time up to its 64 tokens.
_EFFICIENCY = {"torch": 0.80, "fused": 0.72, "library": 0.80, "cuda": 0.35}
_EFFICIENCY_FLOAT32 = {"torch": 0.85, "fused": 0.35, "library": 0.85, "cuda": 0.0}
#: Share of the memory bandwidth while weights stream past a few tokens.
_STREAMING = {"torch": 0.75, "fused": 0.70, "library": 0.75, "cuda": 0.90}
_ROADS = {"torch": ("torch",), "triton": ("fused", "library"), "cuda": ("cuda",)}
_LAUNCH = 4e-6


def rates_of(capability: tuple[int, int]) -> Rates:
    """Peaks by compute capability; one not listed counts as the nearest older one."""
    number = 10 * capability[0] + capability[1]
    return _RATES[max((c for c in _RATES if c <= number), default=min(_RATES))]


class Sizes(NamedTuple):
    """What a prediction depends on.

    Attributes:
        dtype, rows, width: of x.
        pairs, gated: of the FFN.
        memories, slots, rank: of the memory; as in `Problem` 0 where there is none.
        wide: the memory's elements are larger than x's.
        tf32: float32 products may round to TF32.
    """

    dtype: torch.dtype
    rows: int
    width: int
    pairs: int
    gated: bool
    memories: int
    slots: int
    rank: int
    wide: bool
    tf32: bool


def sizes_of(problem: Problem) -> Sizes:
    """The problem as the predictions see it."""
    x, key, memory, basis = problem.x, problem.key, problem.visual_key, problem.visual_basis
    rows, width = x.shape
    memories, slots = (0, 0) if memory is None else memory.shape[:2]
    return Sizes(
        dtype=x.dtype, rows=rows, width=width, pairs=0 if key is None else key.shape[0], gated=problem.gate is not None,
        memories=memories, slots=slots, rank=0 if basis is None else basis.shape[0],
        wide=memory is not None and memory.element_size() > x.element_size(), tf32=x.dtype == torch.float32 and tf32_allowed(),
    )  # fmt: skip


@functools.lru_cache(4096)
def fastest(sizes: Sizes, backends: tuple[str, ...], rates: Rates) -> str:
    """The backend with the least predicted time, of several the first."""
    return min(backends, key=lambda backend: predict(sizes, backend, rates))


def predict(sizes: Sizes, backend: str, rates: Rates) -> float:
    """Predicted seconds of one forward in "torch", "triton" (its faster road) or "cuda"."""
    return min(_predict(sizes, road, rates) for road in _ROADS[backend])


def _predict(sizes: Sizes, road: str, rates: Rates) -> float:
    p = sizes
    size = p.dtype.itemsize
    factored, has_memory = p.rank > 0, p.memories > 0
    matrices = 2 + p.gated if p.pairs else 0
    branches = max(matrices - 1, 0)
    weights = matrices * p.pairs * p.width
    if factored:
        shared, own = 2 * (p.rank + p.slots) * p.width, 2 * p.memories * p.slots * p.rank
    else:
        shared, own = 0, 2 * p.memories * p.slots * p.width
        if road == "cuda" and p.wide:
            own *= 4  # twice the bytes, added to the positions in registers and not in a ring: about half the rate
    per_row = weights + 2 * p.slots * p.width if not factored else weights + shared + 2 * p.slots * p.rank
    flops = 2.0 * p.rows * per_row
    moved = (weights + shared + own + 2 * p.rows * p.width + 2 * p.rows * p.pairs) * size
    # The decode kernel has three, each begun before the one ahead of it has ended.
    launches = {
        "torch": 4 + 5 * has_memory + 2 * factored,
        "fused": 2 + factored,
        "library": 2 + branches + 2 * has_memory + factored,
        "cuda": 2,
    }[road]
    # A library's products write the pre-activations and a pass reads them again; PyTorch takes two passes for a gate, and more for the memory.
    passes = {"torch": 2 * (branches + p.gated) * p.pairs + 4 * p.slots, "library": 2 * branches * p.pairs + p.width}
    half = p.dtype in (torch.float16, torch.bfloat16)
    peak = rates.tensor if half else rates.cuda
    if not half and p.tf32:
        peak = rates.tensor / 2
        half = True
    efficiency = (_EFFICIENCY if half else _EFFICIENCY_FLOAT32)[road]
    if efficiency == 0.0:
        return float("inf")
    bandwidth = rates.memory * _STREAMING[road]
    between = p.rows * passes.get(road, 0) * size / bandwidth
    return max(flops / (peak * efficiency), moved / bandwidth) + between + launches * _LAUNCH
