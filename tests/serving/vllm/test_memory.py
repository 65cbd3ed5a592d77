"""What a step costs besides the products: every FFN reads one memory, joined once, and the cores where they lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from memvp_kernels.serving.vllm import save_for_vllm
from memvp_kernels.serving.vllm.folder import ServedFolder
from memvp_kernels.serving.vllm.memory import EngineMemory, ImageEncoder
from tests.serving import tiny

CPU = torch.device("cpu")


def engine_memory(folder: Path) -> EngineMemory:
    served = ServedFolder.of(str(folder))
    encoder = ImageEncoder(served, width=128, layers=3, dtype=torch.float32, device=CPU)
    return EngineMemory(encoder, requests=4, device=CPU)


def test_no_operand_is_copied(tmp_path: Path) -> None:
    model = tiny.model()
    save_for_vllm(model, tmp_path)
    memory = engine_memory(tmp_path)
    memory.bind(torch.tensor([0, 1, 2]), torch.tensor([0, memory.no_image]), tokens=2, padded=2)
    x, y = torch.randn(2, 2, 128)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        memory.run(x, {}, 1, "silu", residual=y)
    called = Counter(event.name for event in profile.events())
    assert called["aten::addmm"] + called["aten::mm"]
    assert called["aten::cat"] == 1, "the tokens' own [visual A | visual]"
    assert not called.keys() & {"aten::nan_to_num", "aten::isfinite", "aten::sum"}


def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.key_position[0, 0] = torch.inf
    save_for_vllm(model, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        engine_memory(tmp_path)
