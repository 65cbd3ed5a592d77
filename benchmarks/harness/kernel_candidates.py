"""What stands beside one kernel in its case: its launch on each road, and the bare matrix products it contains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from harness.cli import Setting
from harness.measure import Candidate, Truth
from harness.rooflines import FFNShape, kernel
from harness.timer import Run
from harness.variants import missing_road

__all__ = ["Operands", "Outputs", "of_kernel"]

Outputs = dict[str, Tensor]

_NOTES = {
    "library": "the shared products by torch.mm, with the backend's passes and memory kernels around them",
    "gluon": "the shared products by the warp-specialised Gluon kernels, the memory's own beside them",
    "wgmma": "the shared products by the extension's warp-specialised kernels, the memory's own beside them",
}


class Operands(Protocol):
    """What the kernels of one file of cases read, and by a kernel's name: plain PyTorch, its launch, its products, the bytes it holds."""

    def reference(self, name: str, dtype: torch.dtype) -> Outputs: ...
    def triton(self, name: str, road: str) -> Callable[[], Outputs]: ...
    def products(self, name: str) -> Callable[[], object]: ...
    def held(self, name: str) -> int: ...


def of_kernel(
    make: Callable[[Setting, FFNShape], Operands],
    roads: Sequence[str],
    setting: Setting,
    name: str,
    *,
    sequences: int,
    text_length: int,
    visual_tokens: int,
) -> list[Candidate]:
    """One kernel and the products within it.

    Args:
        make: the operands, formed once and when the first candidate needs them.
        roads: on which the kernel is launched.
        setting: device, dtype, preset.
        name: the kernel's.
        sequences, text_length, visual_tokens: S, T, tokens of an image.
    """
    shape = FFNShape.of(
        setting.preset, sequences=sequences, tokens=text_length, visual_tokens=visual_tokens, element=setting.element
    )
    operands = functools.cache(lambda: make(setting, shape))

    def truth() -> Truth:
        return Truth(operands().reference(name, setting.dtype), operands().reference(name, torch.float64))

    def launched(road: str) -> tuple[Callable[[], Outputs], Run, int]:
        call = operands().triton(name, road)
        return call, Run([call]), operands().held(name)

    def products() -> tuple[Outputs, Run, int]:
        return operands().reference(name, setting.dtype), Run([operands().products(name)]), operands().held(name)

    count = kernel(name, shape)
    variants = {"triton" if road == "fused" else road: road for road in roads}
    return [
        Candidate("matmul", products, truth, count, note="the kernel's matrix products alone, one after the other"),
        *(
            Candidate(
                variant, functools.partial(launched, road), truth, count, missing=missing_road(road, setting.device), note=_NOTES.get(road, "")
            )
            for variant, road in variants.items() if setting.wants(variant)
        ),
    ]  # fmt: skip
