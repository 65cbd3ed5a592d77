"""The server's images are MemVPModel's, with what was trained inside the vision model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memvp_kernels.models.patching.vision_adapters import attach_adapters
from memvp_kernels.serving.vllm import save_for_vllm
from memvp_kernels.serving.vllm.folder import ServedFolder
from memvp_kernels.serving.vllm.memory import ImageEncoder
from tests.serving import tiny


@pytest.mark.parametrize("trained", ["nothing", "adapters"])
def test_cores_of_pictures(trained: str, tmp_path: Path) -> None:
    model = tiny.model(pictures=True)
    if trained == "adapters":
        for adapter in attach_adapters(model.vision_model, hidden_dim=4, scale=0.5):
            torch.nn.init.normal_(adapter.fc2.weight)
    model.eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_images(pixel_values=pixels)
    save_for_vllm(model, tmp_path)
    encoder = ImageEncoder(
        ServedFolder.of(str(tmp_path)), width=128, layers=3, dtype=torch.float32, device=torch.device("cpu")
    )
    torch.testing.assert_close(torch.stack(encoder.encode(pixel_values=pixels)), expected, rtol=0, atol=0)
