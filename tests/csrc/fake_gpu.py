"""Problems whose tensors say they are on a GPU, so that the Python side of the cuda backend runs where there is none."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import dispatch
from memvp_kernels.backends.cuda import decode, extension
from memvp_kernels.checks import TENSORS, check_scalars, check_tensors
from memvp_kernels.problem import Problem, normalize

DEVICE = torch.device("cuda", 0)


class OnGPU:
    """A CPU tensor that gives its device as cuda:0; everything else is the tensor's own."""

    device = DEVICE

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def contiguous(self) -> OnGPU:
        return self if self.tensor.is_contiguous() else OnGPU(self.tensor.contiguous())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


@dataclass
class Machine:
    """A machine with one GPU, as torch.cuda tells of it; attributes may change while it is installed.

    Attributes:
        extension: memvp_kernels._C, or None where it was not built.
        capability, multiprocessors, shared_bytes: of the GPU; the shared memory is a multiprocessor's.
        stream: the current stream's handle.
        allocated: what torch.empty gave, poisoned: NaN, or all bits set.
    """

    extension: types.ModuleType | None
    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    shared_bytes: int = 228 << 10
    stream: int = 77
    allocated: list[OnGPU] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts this machine in the place of the real one."""
        empty = torch.empty

        def allocate(*shape: Any, device: torch.device, **options: Any) -> OnGPU:
            assert device == DEVICE
            tensor = empty(*shape, **options)
            self.allocated.append(OnGPU(tensor.fill_(float("nan") if tensor.is_floating_point() else 0xFF)))
            return self.allocated[-1]

        def current_stream(device: torch.device) -> types.SimpleNamespace:
            assert device == DEVICE
            return types.SimpleNamespace(cuda_stream=self.stream)

        def properties(_: int) -> types.SimpleNamespace:
            return types.SimpleNamespace(
                multi_processor_count=self.multiprocessors, shared_memory_per_multiprocessor=self.shared_bytes
            )

        monkeypatch.setattr(
            extension, "_import", lambda: (self.extension, "" if self.extension else extension._NOT_BUILT)
        )
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
        monkeypatch.setattr(torch, "empty", allocate)


def forget() -> None:
    """Clears what the package remembers of the extension and the GPU."""
    decode._latest = None
    remembered = (decode._type_codes, decode._tensors, decode._chip)
    known = (
        _IMPORT,
        extension.device_limit,
        extension.hopper_limit,
        extension._machine_limit,
        dispatch._missing_on_gpu,
    )
    for function in (*remembered, *known):
        function.cache_clear()


_IMPORT = extension._import  # itself, whatever a test puts in its place


def problem_of(
    *,
    activation: str = "silu",
    visual_activation: str | None = None,
    visual_map: str | None = None,
    visual_drop: float = 0.0,
    visual_scale: float = 1.0,
    **tensors: Any,
) -> Problem:
    """The Problem that `fused_ffn` makes of these arguments, on the CPU."""
    scalars = check_scalars(
        activation=activation, visual_activation=visual_activation, visual_map=visual_map, visual_drop=visual_drop,
        visual_scale=visual_scale, dropout_p=0.0,
    )  # fmt: skip
    given = {name: tensors.pop(name, None) for name in TENSORS}
    assert not tensors, f"unknown arguments {sorted(tensors)}"
    check_tensors(given)
    return normalize(given, scalars)


def on_gpu(problem: Problem, **changes: Any) -> Problem:
    """The problem with every tensor on the pretended GPU, and some fields changed."""
    segments = dataclasses.replace(problem.segments, **_moved(problem.segments))
    return dataclasses.replace(problem, **{**_moved(problem), "segments": segments, **changes})


def _moved(fields: Any) -> dict[str, Any]:
    found = {field.name: getattr(fields, field.name) for field in dataclasses.fields(fields)}
    return {name: OnGPU(value) for name, value in found.items() if isinstance(value, Tensor)}
