"""What would lose an image is refused at start, by a sentence that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from memvp_kernels.serving.vllm import compat, save_for_vllm
from memvp_kernels.serving.vllm.folder import ServedFolder
from memvp_kernels.serving.vllm.memory import ImageEncoder
from tests.serving import tiny
from tests.serving.vllm.engine import Request, answers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    save_for_vllm(tiny.model("Mistral", sizes={"sliding_window": 64}), made)
    return made


def config(folder: Path, **options: Any) -> Any:
    options = {"max_model_len": 64} | options
    return EngineArgs(model=str(folder), skip_tokenizer_init=True, dtype="float32", **options).create_engine_config()


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("pipeline parallelism", {"pipeline_parallel_size": 2}),
        ("KV connector", {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}),
        ("KV offload", {"kv_offloading_size": 1.0}),
        ("runner V1 with a sliding window of 64", {"max_model_len": 65}),
    ],
)
def test_what_an_engine_is_asked(what: str, options: dict[str, Any], folder: Path) -> None:
    compat.check_config(config(folder))
    with pytest.raises(ValueError, match=what):
        compat.check_config(config(folder, **options))


@pytest.mark.parametrize(
    ("what", "part", "name", "value"),
    [
        ("micro-batches", "parallel_config", "enable_dbo", True),
        ("micro-batches", "parallel_config", "ubatch_size", 2),
        ("prefill context parallelism", "parallel_config", "prefill_context_parallel_size", 2),
    ],
)
def test_what_a_cpu_is_never_asked(what: str, part: str, name: str, value: Any, folder: Path) -> None:
    asked = config(folder)
    setattr(getattr(asked, part), name, value)
    with pytest.raises(ValueError, match=what):
        compat.check_config(asked)


def test_an_engine_asks(folder: Path) -> None:
    with pytest.raises(AssertionError, match="memvp_kernels does not serve with a KV connector or KV offload"):
        answers(folder, [[Request([1, 2])]], tokens=1, max_model_len=64, kv_offloading_size=1.0)


def test_an_adapter_of_another_base(folder: Path) -> None:
    parts = {"layers": 3, "dtype": torch.float32, "device": torch.device("cpu")}
    ImageEncoder(ServedFolder.of(str(folder)), width=128, **parts)
    with pytest.raises(ValueError, match="the adapter does not fit this language model"):
        ImageEncoder(ServedFolder.of(str(folder)), width=64, **parts)


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0+cpu", "1.30.0"])
def test_a_version_of_vllm(version: str) -> None:
    for supported in ("0.30.0", "0.33.1rc2.dev5+cpu"):
        compat.check_version(supported)
    with pytest.raises(RuntimeError, match=rf"0\.30 to 0\.33, got {version}".replace("+", r"\+")):
        compat.check_version(version)
