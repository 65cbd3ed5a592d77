"""A problem on its whole way: Problem, decode.py, bindings.cpp, struct, kernels, result; with the kernels run on the CPU."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import reference
from memvp_kernels.backends.cuda import decode
from tests import cases, tolerance
from tests.csrc.fake_gpu import Machine, on_gpu, problem_of


@pytest.fixture(autouse=True)
def _on_the_host(emulated_extension: types.ModuleType, monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    Machine(emulated_extension, multiprocessors=3).install(monkeypatch)


def run(arguments: dict[str, Any]) -> Tensor:
    """`fused_ffn(**arguments, backend="cuda")` on the pretended GPU."""
    problem = on_gpu(problem_of(**arguments))
    assert decode.unsupported(problem) is None
    y, _, _ = decode.forward(problem)
    return y.tensor.view(arguments["x"].shape)


def check(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    y = run(arguments)
    monkeypatch.undo()
    tolerance.assert_within_twice(y, reference.ffn(**arguments), tolerance.plain(**arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in cases.names() if name not in ("no_tokens", "no_sequences")])
def test_matches_float64(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check(cases.build(name, dtype), monkeypatch)


LAYOUTS = dict(cases.strided(cases.build("gated_biased_residual-plain", torch.bfloat16)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(LAYOUTS[layout], monkeypatch)


@pytest.mark.parametrize("form", ["auto", "pdl", "cooperative"])
def test_the_fast_path_with_every_argument(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = cases.memory(cases.ffn(torch.bfloat16, S=4, T=3, d=64, F=128, biased=True), R=3, M=16, r=8, wide=True)
    arguments |= {
        "visual_index": torch.tensor([2, -1, 0, 2]),
        "visual_lengths": torch.tensor([16, 3, 5], dtype=torch.int32),
        "residual": cases.random(4, 3, 64, dtype=torch.bfloat16),
        "activation": "gelu_tanh",
        "visual_activation": "relu",
        "visual_scale": 0.25,
    }
    assert decode.is_fast(on_gpu(problem_of(**arguments)))
    with decode.override_form(form):
        check(arguments, monkeypatch)


def test_a_launch_past_the_limits_says_which() -> None:
    problem = on_gpu(problem_of(**cases.ffn(torch.bfloat16, S=13, T=5)))
    with pytest.raises(RuntimeError, match=r"^ffn_decode: .* at most 64 tokens"):
        decode.forward(problem)


def test_bindings_refuse_what_is_no_tensor(emulated_extension: types.ModuleType) -> None:
    fields = dict.fromkeys(
        ("type", "cu_seqlens", "visual_index", "visual_lengths", "tokens", "width", "pairs", "slots", "rank", "memories",
         "sequences", "length", "activation", "visual_activation", "form", "multiprocessors", "shared_bytes", "device"), 0
    )  # fmt: skip
    fields |= {"shared_memory": False, "visual_scale": 1.0}
    absent = [None] * len(emulated_extension.tensor_names)
    emulated_extension.FfnDecodeParams(tuple(absent), **fields)
    with pytest.raises(TypeError, match="tensors: wanted 13, got 12"):
        emulated_extension.FfnDecodeParams(tuple(absent[1:]), **fields)
    for wrong in ((1, 0), 17, (1, 0, 1, 1, 1, 1), torch.ones(2)):
        with pytest.raises(TypeError, match="key: wanted None or"):
            emulated_extension.FfnDecodeParams((None, wrong, *absent[2:]), **fields)
    with pytest.raises(TypeError):
        emulated_extension.FfnDecodeParams(tuple(absent), **dict(fields, tokens=2**31))
