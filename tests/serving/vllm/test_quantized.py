"""A base in 8 bits runs vLLM's own kernels, and the memory is added to what they give."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from memvp_kernels.serving.vllm import save_for_vllm
from tests.serving import tiny
from tests.serving.vllm.engine import Request, answers

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_SCHEME = {
    "targets": ["Linear"],
    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
}


def quantize(folder: Path) -> None:
    """The saved linear layers in int8, as compressed-tensors stores them."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[name], weights[f"{name}_scale"] = (weights[name] / scale).round().to(torch.int8), scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": _SCHEME},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_eight_bits(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        for name, parameter in model.memory.named_parameters():
            if "value_position" in name:  # then a request without an image has nothing added
                parameter.zero_()
    model.language_model.save_pretrained(tmp_path / "base")
    quantize(tmp_path / "base")
    save_for_vllm(model, tmp_path / "served", base=tmp_path / "base")
    text = Request(list(range(40, 60)))
    images = [Request(text.prompt, image) for image in tiny.images(2)]
    plain = answers(tmp_path / "base", [[text]], tokens=16).rounds[0]
    report = answers(tmp_path / "served", [[text, *images, text]], tokens=16)
    assert "Int8" in report.log
    first, one, two, last = (answer.tokens for answer in report.rounds[0])
    assert first == last == plain[0].tokens
    assert len({tuple(tokens) for tokens in (first, one, two)}) == 3
