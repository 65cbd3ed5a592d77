"""The folder that is served, written and checked without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memvp_kernels.models.io import adapter
from memvp_kernels.serving.vllm import save_for_vllm
from memvp_kernels.serving.vllm.__main__ import main
from memvp_kernels.serving.vllm.folder import ServedFolder, export
from tests.serving import tiny


def test_saved_model(tmp_path: Path) -> None:
    model = tiny.model(pictures=True)
    save_for_vllm(model, tmp_path, tokenizer=tiny.save_tokenizer(tmp_path / "words"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["MemVPLlamaForCausalLM"] and config["model_type"] == "llama"
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.language_model.state_dict())
    assert (tmp_path / "tokenizer.json").is_file()
    served = ServedFolder.of(str(tmp_path))
    assert served.config == model.memvp_config and served.rank == model.projector.rank
    assert served.vision is not None and (served.vision / "preprocessor_config.json").is_file()
    _, state, _ = adapter.load(served.adapter)
    assert torch.equal(state["key_position"], model.key_position)


def test_base_is_linked_where_it_has_a_folder(tmp_path: Path) -> None:
    model = tiny.model()
    model.language_model.save_pretrained(tmp_path / "base")
    save_for_vllm(model, tmp_path / "served", base=tmp_path / "base")
    weights = tmp_path / "served" / "model.safetensors"
    assert weights.is_symlink() and weights.resolve() == tmp_path / "base" / "model.safetensors"
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("copy", [False, True])
def test_export_writes_what_save_for_vllm_does(copy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model("Gemma", pictures=True)
    model.language_model.save_pretrained(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    save_for_vllm(model, tmp_path / "saved")
    vision = tmp_path / "saved" / "memvp" / "vision"
    places = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--vision", vision, tmp_path / "served"]
    main(["export", *map(str, places), *(["--copy"] if copy else [])])
    assert capsys.readouterr().out == f"vllm serve {tmp_path / 'served'}\n"
    assert (tmp_path / "served" / "model.safetensors").is_symlink() != copy
    for name in ("config.json", "model.safetensors", "memvp/memvp_model.safetensors", "memvp/vision/model.safetensors"):
        assert (tmp_path / "served" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_refusals(tmp_path: Path) -> None:
    model = tiny.model()
    model.language_model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    wide = tiny.model(sizes={"hidden_size": 64, "head_dim": 16})
    wide.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"width 64, and the base has 128"):
        export(tmp_path / "base", tmp_path / "narrow", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="memvp_config"):
        export(tmp_path / "base", tmp_path / "base", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        export(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "c")
    with pytest.raises(ValueError, match="another folder"):
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    tiny.model(layers=(2,)).save_pretrained(tmp_path / "deep")
    tiny.model(sizes={"num_hidden_layers": 2}).language_model.save_pretrained(tmp_path / "shallow")
    with pytest.raises(ValueError, match="layers"):
        export(tmp_path / "shallow", tmp_path / "deep", tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="save_for_vllm"):
        ServedFolder.of(str(tmp_path / "base"))


def test_vllm_is_not_imported_before_it_asks() -> None:
    code = "import sys, memvp_kernels.models, memvp_kernels.serving.vllm; assert not any(m.split('.')[0] == 'vllm' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
