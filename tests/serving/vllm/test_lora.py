"""LoRA in the FFNs: vLLM runs them, each request with its own adapter or none, and the memory is added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from memvp_kernels import MemVPModel
from memvp_kernels.serving.vllm import save_for_vllm
from tests.serving import tiny
from tests.serving.vllm.engine import Request, answers
from tests.serving.vllm.test_engine import RUNNERS, assert_equal

RANK, ALPHA = 8, 16
LINEARS = ("gate_proj", "up_proj", "down_proj")


def save_lora(model: MemVPModel, folder: Path) -> None:
    """Write a random adapter of every FFN as PEFT does, and merge it into the model."""
    state: dict[str, Tensor] = {}
    for name, weight in model.language_model.named_parameters():
        owner = name.removesuffix(".weight")
        if owner.endswith(LINEARS):
            a, b = 0.1 * torch.randn(RANK, weight.shape[1]), 0.1 * torch.randn(weight.shape[0], RANK)
            state |= {f"base_model.model.{owner}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
            weight.data += ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": LINEARS}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("runner", RUNNERS)
def test_lora(runner: str, tmp_path: Path) -> None:
    base, merged = (tiny.model(memory_scale=0.03) for _ in range(2))
    save_for_vllm(base, tmp_path / "served")
    save_lora(merged, tmp_path / "lora")
    prompt = list(range(40, 60))
    requests = [Request(prompt, image) for image in (None, *tiny.images(2))]
    report = answers(
        tmp_path / "served",
        [requests, requests],
        tokens=12,
        runner=runner,
        enable_lora=True,
        max_lora_rank=RANK,
        lora=str(tmp_path / "lora"),
    )
    for model, said in ((base, report.rounds[:1]), (merged, report.rounds[1:])):
        assert_equal(model, [requests], report._replace(rounds=said))
    assert all(a.tokens != b.tokens for a, b in zip(*report.rounds, strict=True)), "LoRA changes the answers"
