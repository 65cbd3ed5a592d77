"""A pytest plugin that pretends a GPU: every test runs up to its first fused call, whose tensors must all be on the device.

    python -m pytest -p tests.pretended_gpu -m "gpu and not slow" tests/triton

Finds, on a machine without a GPU, the tests that would fail on one because they leave a tensor on the CPU.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction

import memvp_kernels
from memvp_kernels import ffn, shared_memory
from tests import tolerance

_GPU, _CPU = torch.device("cuda", 0), torch.device("cpu")


class Reached(BaseException):  # passes through a test's own `except Exception`
    """The test has made a fused call, and all its tensors are on the device."""


def _here(tensor: Any) -> bool:
    return getattr(tensor, "on_pretended_gpu", False)


class _PretendedDevice(TorchFunctionMode):
    """Tensors that are asked for on the GPU, and what is computed from them, are CPU tensors with a mark."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return _GPU if _here(args[0]) else _CPU
        if func == torch.Tensor.is_cuda.__get__:
            return _here(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        devices = []

        def own(value: Any) -> Any:
            if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")):
                devices.append(torch.device(value).type)
                return _CPU
            return value

        moved_args, moved_kwargs = tree_map(own, (args, kwargs))
        marked = "cuda" in devices if devices else any(map(_here, tree_leaves((args, kwargs))))
        if func is torch.zeros and math.prod(a for a in args if isinstance(a, int)) > 2**30:
            func = torch.empty  # gigabytes that a GPU would have: reserved, and never touched
        if func is torch.Tensor.cuda or func is torch.Tensor.cpu:
            marked, func = func is torch.Tensor.cuda, torch.Tensor.clone
        result = func(*moved_args, **moved_kwargs)

        def mark(value: Any) -> Any:
            if isinstance(value, Tensor) and _here(value) != marked:
                if any(value is a for a in args) and not func.__name__.endswith("_"):
                    value = value.clone()  # .to() returns a tensor that is where it should be
                if not any(value is a for a in args):
                    value.on_pretended_gpu = marked  # type: ignore[attr-defined]
            return value

        return tree_map(mark, result) if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) else result


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


def _stops(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(enumerate(args)), **kwargs}
        tensors = {n: getattr(v, "base", v) for n, v in given.items()}
        tensors = {n: t for n, t in tensors.items() if isinstance(t, Tensor)}
        if kwargs.get("backend") == "torch" and not any(map(_here, tensors.values())):
            return function(*args, **kwargs)
        left = [str(name) for name, tensor in tensors.items() if not _here(tensor)]
        assert not left, f"on the CPU: {', '.join(left)}"
        raise Reached

    return call


_DEVICE = {"name": "pretended", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 2**37}
_ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "get_device_name": "pretended",
}
_SILENT = ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "synchronize", "Event", "device_of", "device", "_sleep", "set_sync_debug_mode")  # fmt: skip

os.environ.pop("TRITON_INTERPRET", None)
for _name, _answer in _ANSWERS.items():
    setattr(torch.cuda, _name, lambda *_, answer=_answer: answer)
for _name in _SILENT:
    setattr(torch.cuda, _name, MagicMock())
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(**_DEVICE)
torch.Generator = _Generator  # type: ignore[misc]
torch.compile = lambda function=None, **_: function  # type: ignore[assignment]
memvp_kernels.fused_ffn = ffn.fused_ffn = _stops(ffn.fused_ffn)
shared_memory.fused_ffn_shared = _stops(shared_memory.fused_ffn_shared)
JITFunction.run = _stops(JITFunction.run)
tolerance.check = lambda candidate, arguments, **_: candidate(**arguments)  # the definition in float64 can wait


@pytest.hookimpl(trylast=True)  # after -m has selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of each function the first and the last set of parameters: where its tensors lie rarely depends on them."""
    of_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_function.setdefault(item.nodeid.split("[")[0], []).append(item)
    items[:] = [item for found in of_function.values() for item in dict.fromkeys((found[0], found[-1]))]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    with _PretendedDevice():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    try:
        return (yield)
    except Reached:
        return True
