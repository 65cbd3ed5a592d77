"""Measures the chip's ceilings, in the run that uses them: a large matrix product, a copy, a read-only stream."""

from __future__ import annotations

import functools

import torch

from harness.rooflines import Roofs
from harness.timer import Run, Timer

__all__ = ["measure_roofs"]


def measure_roofs(device: torch.device, dtype: torch.dtype, *, samples: int = 20) -> Roofs:
    """The best that this chip does at three plain tasks, on random data (zeros run faster than a model ever will).

    Args:
        device: to measure.
        dtype: of the matrix product; bandwidth does not depend on it.
        samples: per task; the fastest counts, for a ceiling is what is possible.
    """
    big = device.type == "cuda"
    side = 8192 if big else 1024
    stream_bytes = 2 * 2**30 if big else 128 * 2**20
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty(side, side, dtype=dtype, device=device)
    source = torch.randn(stream_bytes // 4, device=device)
    target = torch.empty_like(source)
    total = torch.empty((), device=device)
    runs = {
        "matmul": Run([functools.partial(torch.mm, left, right, out=product)]),
        "copy": Run([functools.partial(target.copy_, source)]),
        "sum": Run([functools.partial(torch.sum, source, dim=0, out=total)]),
        "dot": Run([functools.partial(torch.dot, source, source)]),
        "max": Run([functools.partial(torch.amax, source, dim=0, out=total)]),
    }
    timings = Timer(device, samples=samples, warmup_ms=200 if big else 50).compare(runs)
    best = {name: min(timing.samples) for name, timing in timings.items()}
    return Roofs(
        matmul_tflops=2 * side**3 / best["matmul"] / 1e9,
        copy_gbs=2 * stream_bytes / best["copy"] / 1e6,
        stream_gbs=stream_bytes / min(best["sum"], best["dot"], best["max"]) / 1e6,
    )
