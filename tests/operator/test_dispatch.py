"""Which backend "auto" takes: the cost model's order, without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import pytest
import torch

from memvp_kernels import dispatch
from memvp_kernels.checks import TENSORS
from memvp_kernels.dispatch import Sizes
from memvp_kernels.hardware import Chip, chip_of
from memvp_kernels.problem import Problem, normalize
from tests import cases
from tests.csrc.fake_gpu import OnGPU

HOPPER = chip_of(90)


def problem_of(a: dict[str, Any]) -> Problem:
    scalars = {"activation": "silu", "visual_activation": "silu", "visual_scale": 0.1, "dropout_p": 0.0}
    return normalize({n: a.get(n) for n in TENSORS}, scalars)


def llama_7b(rows: int, dtype: torch.dtype = torch.bfloat16, images: int = 1, factored: bool = True) -> Sizes:
    """LLaMA-7B's FFN with 320 slots, on no device at all."""
    with torch.device("meta"):
        a: dict[str, Any] = {n: torch.empty(11008, 4096, dtype=dtype) for n in ("key", "value", "gate")}
        a["x"] = torch.empty(images, rows // images, 4096, dtype=dtype)
        core = torch.empty(images, 320, 136 if factored else 4096, dtype=dtype)
        a.update(visual_key=core, visual_value=core)
        if factored:
            a["visual_basis"] = torch.empty(136, 4096, dtype=dtype)
    return dispatch.sizes_of(problem_of(a))


def fastest(sizes: Sizes) -> str:
    return dispatch.fastest(sizes, ("torch", "triton", "decode"), HOPPER)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("images", [1, 16])
def test_a_handful_of_tokens_goes_to_the_decode_kernel(images: int, factored: bool) -> None:
    assert fastest(llama_7b(16, images=images, factored=factored)) == "decode"


@pytest.mark.parametrize("rows", [512, 2048, 8192])
def test_prefill_and_training_go_to_triton(rows: int) -> None:
    assert fastest(llama_7b(rows, images=16)) == "triton"


def test_ieee_float32_goes_to_cublas_and_tf32_too() -> None:
    """PyTorch's own products either way, with fewer passes between them; `tl.dot` in IEEE float32 would not pay."""
    sizes = llama_7b(4096, torch.float32)
    assert dispatch._predict(sizes, "cublas", HOPPER) < dispatch.predict(sizes, "torch", HOPPER)
    assert dispatch.predict(sizes, "torch", HOPPER) < dispatch._predict(sizes, "fused", HOPPER)
    torch.set_float32_matmul_precision("high")
    try:
        assert fastest(llama_7b(4096, torch.float32)) == "triton"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_newer_setting_of_tf32_is_read() -> None:
    """After it `torch.get_float32_matmul_precision` raises."""
    known = torch.backends.cuda.matmul.fp32_precision
    seconds = {}
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            seconds[setting] = dispatch.predict(llama_7b(4096, torch.float32), "triton", HOPPER)
    finally:
        torch.backends.cuda.matmul.fp32_precision = known
    assert seconds["tf32"] < seconds["ieee"] / 2


def test_auto_on_a_cpu_is_pytorch() -> None:
    problem = problem_of(cases.build("one_each-plain", torch.float32))
    assert dispatch.choose(problem, "auto", training=False).__name__.endswith("eager")


def test_the_decode_kernel_is_refused_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(cases.build("one_each-plain", torch.bfloat16))
    monkeypatch.setattr(dispatch, "missing", lambda name, device: None)
    monkeypatch.setattr(dispatch._module("decode"), "unsupported", lambda problem: None)
    monkeypatch.setattr(dispatch._module("hopper"), "unsupported", lambda problem: "wgmma is Hopper's")
    with pytest.raises(
        RuntimeError, match=r"backend: wanted 'cuda', but .* has no backward.*wgmma is Hopper's; backend='auto'"
    ):
        dispatch.choose(problem, "cuda", training=True)


def test_auto_predicts_once_for_each_set_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is asked once, a prediction is made once, and what an input rules out is still looked at in every call."""
    problem = problem_of(cases.build("one_each-plain", torch.bfloat16))
    problem = dataclasses.replace(problem, x=OnGPU(problem.x))  # type: ignore[arg-type]
    asked: list[str] = []
    predict = dispatch._predict

    def capability(device: torch.device) -> tuple[int, int]:
        asked.append("capability")
        return 9, 0

    def predicted(sizes: Sizes, name: str, chip: Chip) -> float:
        asked.append(name)
        return predict(sizes, name, chip)

    monkeypatch.setattr(dispatch, "missing", lambda name, device: "not here" if name == "cuda" else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "_predict", predicted)
    # The same caches, empty and this test's own.
    monkeypatch.setattr(dispatch, "_chip", functools.cache(dispatch._chip.__wrapped__))
    monkeypatch.setattr(dispatch, "fastest", functools.lru_cache(dispatch.fastest.__wrapped__))
    reason: str | None = None
    monkeypatch.setattr(dispatch._module("triton"), "unsupported", lambda problem: reason)

    first = dispatch.choose(problem, "auto", training=False)
    assert sorted(asked) == ["capability", "cublas", "fused", "torch"]
    asked.clear()
    assert dispatch.choose(problem, "auto", training=False) is first
    assert not asked
    reason = "not this one"
    assert dispatch.choose(problem, "auto", training=False).__name__.endswith("eager")
