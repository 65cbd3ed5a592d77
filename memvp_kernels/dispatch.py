"""Which implementation computes a problem: one of the backend asked for by name, or for "auto" the one that should finish first.

"auto" counts FLOPs, bytes and launches over the chip's rates (:mod:`memvp_kernels.hardware`). Nothing is timed, so the choice is the
same on every rank and in every run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch

from memvp_kernels.hardware import RATES, Chip, chip_of
from memvp_kernels.precision import tf32_allowed
from memvp_kernels.problem import Problem

__all__ = ["AUTO_TAKES_HOPPER", "available", "choose", "materializing_pays", "missing", "require"]

#: Whether "auto" may take the CUDA kernels for Hopper (csrc/hopper). False until they have run on a GPU and beaten the others there;
#: backend="cuda" takes them by name.
AUTO_TAKES_HOPPER = False

#: Of a float32 product over what copying reaches: 0.19 TFLOP/s and 28 GB/s, measured on two cores of an EPYC.
_CPU_FLOPS_PER_BYTE = 7
#: Bytes that stay in the last-level cache from one layer to the next. Assumed; read from there, Kv and Vv of four images (5.2 MB)
#: took half the time of their factors' products, measured on the same cores.
_CPU_CACHE = 8 * 2**20

_BACKENDS = {"torch": ("torch",), "triton": ("triton",), "cuda": ("decode", "hopper")}
#: Each has `unsupported` and `forward`, and `backward` where it can train.
_MODULES = {
    "torch": "memvp_kernels.backends.torch.eager",
    "triton": "memvp_kernels.backends.triton",
    "decode": "memvp_kernels.backends.cuda.decode",
    "hopper": "memvp_kernels.backends.cuda.gemm",
}


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


@functools.cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        _module("triton")
    except Exception as error:  # a broken package may raise anything, and is then as good as none
        return f"Triton is installed and can't be used: {type(error).__name__}: {error}"
    return None


def _missing_extension() -> str | None:
    status = importlib.import_module("memvp_kernels.backends.cuda.extension").status()
    return None if status.available else str(status.reason)


def missing(name: str, device: torch.device) -> str | None:
    """Why this machine can't run backend `name` on tensors of `device`; None when it can."""
    if name in ("auto", "torch"):
        return None
    if device.type == "cuda":
        return _missing_on_gpu(name, device)
    if name == "cuda":
        return _missing_extension() or f"x is on {device}, and the extension's kernels need an NVIDIA GPU"
    if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {device}, and Triton needs a GPU (or TRITON_INTERPRET=1 in the environment before the first import, for tests on a CPU)"
    return _missing_triton()


@functools.cache
def _missing_on_gpu(name: str, device: torch.device) -> str | None:
    """`missing` for a GPU, whose answer can't change while the process runs."""
    if name == "cuda":
        return _missing_extension()
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and major < 8:
        return f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"
    return _missing_triton()


def available() -> dict[str, str | None]:
    """Every backend with the reason why it is missing here, None where it isn't; for the machine's default device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: missing(name, device) for name in _BACKENDS}


def require(name: str, device: torch.device) -> None:
    """Raises RuntimeError where a backend that was asked for by name can't run on this machine."""
    reason = missing(name, device)
    if reason is not None:
        raise RuntimeError(f"backend: wanted {name!r}, but {reason}; backend='auto' takes the fastest that works here")


def choose(problem: Problem, backend: str, *, training: bool) -> ModuleType:
    """The module that computes `problem`.

    Args:
        training: something is kept for a backward, or this is one.

    Raises:
        RuntimeError: `backend` was named, and this machine or this input can't have it; says which limit.
    """
    if backend == "torch":
        return _module("torch")
    device = problem.x.device
    if backend != "auto":
        require(backend, device)
        reasons = []
        for name in _BACKENDS[backend]:
            reason = _refusal(name, problem, training)
            if reason is None:
                return _module(name)
            reasons.append(reason)
        why = "; ".join(dict.fromkeys(reasons))
        raise RuntimeError(f"backend: wanted {backend!r}, but {why}; backend='auto' takes one that can")
    if device.type != "cuda" or torch.version.hip is not None:
        return _module("torch")
    fitting = ["torch"]
    if missing("triton", device) is None and _refusal("triton", problem, training) is None:
        fitting.append("triton")
    if missing("cuda", device) is None:
        if _refusal("decode", problem, training) is None and _module("decode").is_fast(problem):
            fitting.append("decode")
        if AUTO_TAKES_HOPPER and _refusal("hopper", problem, training) is None:
            fitting.append("hopper")
    return _module(fastest(sizes_of(problem), tuple(fitting), _chip(device)))


def _refusal(name: str, problem: Problem, training: bool) -> str | None:
    """Why one implementation can't take this problem; None when it can."""
    if name == "decode" and training:
        return "the decode kernel has no backward (call it under torch.no_grad(), or name 'triton' or 'torch' for training)"
    if name == "hopper":  # built on the Triton backend
        reason = missing("triton", problem.x.device)
        if reason is not None:
            return reason
    reason = _module(name).unsupported(problem)
    return None if reason is None else str(reason)


@functools.cache
def _chip(device: torch.device) -> Chip:
    major, minor = torch.cuda.get_device_capability(device)
    return chip_of(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


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
    x, memory = problem.x, problem.visual_key
    wide = memory is not None and memory.element_size() > x.element_size()
    tf32 = x.dtype == torch.float32 and tf32_allowed()
    p = problem
    return Sizes(x.dtype, p.rows, p.width, p.pairs, p.gated, p.memories, p.slots, p.rank, wide, tf32)


@functools.lru_cache(4096)
def fastest(sizes: Sizes, names: tuple[str, ...], chip: Chip) -> str:
    """Of these implementations the one with the least predicted time, of several the first."""
    return min(names, key=lambda name: predict(sizes, name, chip))


def predict(sizes: Sizes, name: str, chip: Chip) -> float:
    """Predicted seconds of one forward; of "triton" the faster of its two implementations of large products."""
    if name == "triton":
        return min(_predict(sizes, gemm, chip) for gemm in ("fused", "cublas"))
    return _predict(sizes, name, chip)


def _predict(sizes: Sizes, name: str, chip: Chip) -> float:
    p, factored, has_memory = sizes, sizes.rank > 0, sizes.memories > 0
    matrices = 2 + p.gated if p.pairs else 0
    branches = max(matrices - 1, 0)
    weights = matrices * p.pairs * p.width
    if factored:
        shared, own = 2 * (p.rank + p.slots) * p.width, 2 * p.memories * p.slots * p.rank
        per_row = weights + shared + 2 * p.slots * p.rank
    else:
        shared, own = 0, 2 * p.memories * p.slots * p.width
        per_row = weights + 2 * p.slots * p.width
        if name == "decode" and p.wide:
            own *= 4  # twice the bytes, added to the positions in registers and not in a pipeline: about half the rate
    moved = weights + shared + own + 2 * p.rows * p.width + 2 * p.rows * p.pairs
    # Products by cuBLAS write the pre-activations and a pass reads them again; PyTorch takes two passes for a gate, and more for the memory.
    passes = {"torch": 2 * (branches + p.gated) * p.pairs + 4 * p.slots, "cublas": 2 * branches * p.pairs + p.width}
    launches = {
        "torch": 4 + 5 * has_memory + 2 * factored, "cublas": 2 + branches + 2 * has_memory + factored, "decode": 2,
    }.get(name, 2 + factored)  # fmt: skip

    half = p.dtype in (torch.float16, torch.bfloat16)
    share = {"fused": RATES.fused, "decode": RATES.decode, "hopper": RATES.hopper}.get(name, RATES.cublas)
    peak = chip.tensor if half else chip.tensor / 2 if p.tf32 else chip.cuda
    if not half and name in ("decode", "hopper"):
        return float("inf")
    if not half and not p.tf32 and name == "fused":
        share = RATES.ieee
    flops = 2 * p.rows * per_row / (share * peak * chip.multiprocessors)
    streaming = {"torch": RATES.streaming_eager, "cublas": RATES.streaming_eager, "decode": RATES.streaming_decode}
    bytes_per_cycle = chip.memory * streaming.get(name, RATES.streaming)
    between = p.rows * passes.get(name, 0) * p.dtype.itemsize / bytes_per_cycle
    cycles = max(flops, moved * p.dtype.itemsize / bytes_per_cycle) + between
    return chip.seconds(cycles) + launches * RATES.launch_host


def materializing_pays(rows: int, *, images: int, slots: int, rank: int, width: int, calls: int | None = None) -> bool:
    """Whether calls on a CPU should read Kv and Vv (R, M, d) rather than a memory's factors.

    The factors' products have more FLOPs for every row, Kv and Vv more bytes for every image.

    Args:
        rows: N of a call.
        images, slots, rank, width: R, M, r and d.
        calls: how many of them; Kv and Vv are then still to be formed. None: they are there.
    """
    if calls is None and 2 * images * slots * width * 4 <= _CPU_CACHE:
        return True
    fewer = 4 * rows * rank * (width + slots)
    more = 2 * width * 4 * (images * slots - rank - slots) * _CPU_FLOPS_PER_BYTE
    if calls is None:
        return fewer > more
    return calls * (fewer - more) > 2 * images * slots * rank * width
