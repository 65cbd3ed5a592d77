"""Who computes an FFN: the operator as a whole, or vLLM, and the memory is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import LoRAConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.llama import LlamaMLP

from memvp_kernels.serving.vllm import ffn as module
from memvp_kernels.serving.vllm import save_for_vllm
from tests.serving import tiny

D, F = 16, 24


class Quantized(UnquantizedLinearMethod):
    """Any other way to keep a matrix."""


class Memory:
    """Stands for an engine's on some device: notes what an FFN hands over."""

    def __init__(self, device: str) -> None:
        self.cores = SimpleNamespace(device=torch.device(device))

    def run(
        self, x: Tensor, weights: Mapping[str, Any], layer: int, activation: str, residual: Tensor | None = None
    ) -> Tensor:
        self.weights, self.residual = weights, residual
        return x.clone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    save_for_vllm(tiny.model(), made)
    return made


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """vLLM's of an engine, in a process group of one."""
    options = {"max_model_len": 64, "skip_tokenizer_init": True, "dtype": "float32"}
    made = EngineArgs(model=str(folder), **options).create_engine_config()
    with set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'group'}", 0, "gloo")
        initialize_model_parallel()
        yield made
        cleanup_dist_env_and_memory()


def is_whole(config: Any, device: str = "cuda", *, activation: str = "silu", bias: bool = False, **change: Any) -> bool:
    """Whether an FFN was handed over as a whole, with its own matrices.

    Args:
        activation: of the memory.
        change: attributes of its second linear layer.
    """
    ffn, memory = LlamaMLP(D, F, "silu", bias=bias), Memory(device)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    loaded = {name: parameter.detach().clone() for name, parameter in ffn.named_parameters()}
    for name, value in change.items():
        setattr(ffn.down_proj, name, value)
    module.give_memory(ffn, memory, 0, activation, "layer", config)
    for linear in (ffn.gate_up_proj, ffn.down_proj):
        linear.quant_method.process_weights_after_loading(linear)
        linear.tp_size = 1  # the group has no second rank to reduce with
    with set_forward_context(None, config):
        ffn(torch.randn(3, D))
    config.compilation_config.static_forward_context.clear()
    if not memory.weights:
        assert memory.residual is not None
        return False
    assert memory.residual is None
    gate, key = loaded["gate_up_proj.weight"].split(F)
    expected = {"gate": gate, "key": key, "value": loaded["down_proj.weight"].T}
    if bias:
        expected["gate_bias"], expected["key_bias"] = loaded["gate_up_proj.bias"].split(F)
        expected["value_bias"] = loaded["down_proj.bias"]
    given = {name: tensor for name, tensor in memory.weights.items() if tensor is not None}
    assert given.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(given[name]) is Tensor and torch.equal(given[name], tensor), name
    return True


def test_by_device(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "missing", lambda *_: None)
    assert is_whole(config) and is_whole(config, bias=True)
    assert not is_whole(config, "cpu")
    monkeypatch.setattr(module, "missing", lambda *_: "the GPU is sm_75")
    assert not is_whole(config)


def test_by_option(config: Any) -> None:
    config.additional_config = {"memvp_ffn": "fused"}
    assert is_whole(config, "cpu") and is_whole(config, "cpu", bias=True)
    config.additional_config = {"memvp_ffn": "vllm"}
    assert not is_whole(config)
    config.additional_config = {"memvp_ffn": "whole"}
    with pytest.raises(ValueError, match=r'wanted "memvp_ffn" to be "fused" or "vllm", got \'whole\''):
        is_whole(config)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("down_proj is a RowParallelLinear with Quantized", {"quant_method": Quantized}),
        ("tensor parallelism", {"tp_size": 2}),
        ("its activation is not gelu", {"activation": "gelu"}),
        ("LoRA", {}),
    ],
)
def test_what_vllm_has_to_run(
    reason: str, change: dict[str, Any], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing", lambda *_: None)
    change = {name: value() if value is Quantized else value for name, value in change.items()}
    if reason == "LoRA":
        config.lora_config = LoRAConfig()
    assert not is_whole(config, **change)
    config.additional_config = {"memvp_ffn": "fused"}
    with pytest.raises(ValueError, match=f"but .*{reason}.*; leave it out"):
        is_whole(config, **change)
