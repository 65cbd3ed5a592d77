"""save_pretrained and from_pretrained: the adapter alone, to the byte, or an error that names what does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memvp_kernels import MemVPModel
from memvp_kernels.models.patching import vision_adapters as vision
from tests.models.clip import pixels, vision_model
from tests.models.tiny import CONFIG, KINDS, VISION, features, language_model, tokens, with_memory, wrapped

_WEIGHTS = "memvp_model.safetensors"
_TENSORS = {
    "key_position", "value_position",
    "projector.fc1.weight", "projector.fc1.bias", "projector.fc2.weight", "projector.fc2.bias",
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_save_and_load_to_the_byte(family: str, shared: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, shared_positions=shared, layers=(0, 1))
    model = with_memory(language_model(family), config)
    model.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["memvp_config.json", "memvp_model.safetensors"]
    again = MemVPModel.from_pretrained(language_model(family), tmp_path / "a").eval()
    assert again.memvp_config == config
    torch.testing.assert_close(again.adapter_state_dict(), model.adapter_state_dict(), rtol=0, atol=0)
    again.save_pretrained(str(tmp_path / "b"))
    for name in ("memvp_config.json", "memvp_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    inputs = {"input_ids": tokens(3), "labels": tokens(3), "image_features": features(4, 0, 10)}
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_the_file_holds_the_adapter_alone(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "memvp_model.safetensors")
    assert set(state) == _TENSORS
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_vision_adapters_come_along(tmp_path: Path) -> None:
    """Weights, scale and dropout; a vision model without adapters is given them."""
    clip = vision_model(VISION)
    for adapter in vision.attach_adapters(clip, hidden_dim=3, scale=0.4, dropout=0.3):
        torch.nn.init.normal_(adapter.fc2.weight)
    model = with_memory(language_model(), vision_model=clip)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": tokens(2), "pixel_values": pixels(2)}
    again = MemVPModel.from_pretrained(language_model(), tmp_path, vision_model(VISION))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert {a.dropout.p for a in vision.adapters(again.vision_model)} == {0.3}
    with pytest.raises(ValueError, match="parameters for a vision model; pass vision_model="):
        MemVPModel.from_pretrained(language_model(), tmp_path)


_PARTS = {"a norm": "post_layernorm", "a block": "layers.1.mlp", "an embedding": "position_embedding"}


@pytest.mark.parametrize("part", _PARTS.values(), ids=list(_PARTS))
def test_a_partly_trained_vision_model_comes_along(part: str, tmp_path: Path) -> None:
    """It loads into a frozen one, goes on training there, is saved again, and unload() gives the flags back."""
    clip = vision_model(VISION)
    model = with_memory(language_model(), vision_model=clip)
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(part in name)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path / "a")
    fresh = vision_model(VISION)
    before = _flags(fresh)
    again = MemVPModel.from_pretrained(language_model(), tmp_path / "a", fresh)
    inputs = {"input_ids": tokens(2), "pixel_values": pixels(2)}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert _flags(fresh) == _flags(clip)
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / _WEIGHTS).read_bytes() == (tmp_path / "b" / _WEIGHTS).read_bytes()
    again.unload()
    assert _flags(fresh) == before


def test_lora_in_the_vision_model_trains_and_comes_along(tmp_path: Path) -> None:
    """PEFT has decided what trains; the last block, which is never run, is left out, or data parallelism would wait for it."""
    peft = pytest.importorskip("peft")

    def with_lora() -> torch.nn.Module:
        return peft.get_peft_model(vision_model(VISION), peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"]))

    clip = with_lora()
    model = with_memory(language_model(), vision_model=clip).train()
    inputs = {"input_ids": tokens(2), "pixel_values": pixels(2)}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, p in model.vision_model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in clip.named_parameters() if "lora" in name and "layers.2" not in name}
    assert trained == {name for name, p in clip.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            parameter.add_(0.1 * (name in trained))
    model.eval().save_pretrained(tmp_path)
    again = MemVPModel.from_pretrained(language_model(), tmp_path, with_lora()).eval()
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match=r"lora_A.*; pass a vision_model with the adapters \(LoRA\)"):
        MemVPModel.from_pretrained(language_model(), tmp_path, vision_model(VISION))


def _flags(module: torch.nn.Module) -> list[tuple[str, bool]]:
    return [(name, p.requires_grad) for name, p in module.named_parameters()]


def _described(module: torch.nn.Module) -> list[object]:
    return [_flags(module), [type(m) for m in module.modules()], [sorted(vars(m)) for m in module.modules()]]


def test_a_refused_adapter_leaves_the_vision_model_as_it_was(tmp_path: Path) -> None:
    """Its flags, and without the adapters that were meant for it: all of the files or nothing."""
    clip = vision_model(VISION)
    vision.attach_adapters(clip, hidden_dim=3)
    with_memory(language_model(), vision_model=clip).save_pretrained(tmp_path)
    config = tmp_path / "memvp_config.json"
    config.write_text(config.read_text().replace('"num_slots": 10', '"num_slots": 11'))
    other, base = vision_model(VISION), language_model()
    next(other.parameters()).requires_grad_(False)
    before, language_before = _described(other), _described(base)
    with pytest.raises(
        ValueError, match=r"does not fit.*key_position is \(10, 32\), the model's is \(11, 32\); value_position"
    ):
        MemVPModel.from_pretrained(base, tmp_path, other)
    assert _described(other) == before
    assert _described(base) == language_before


def test_a_refused_state_takes_off_the_adapters_it_brought() -> None:
    clip, other = vision_model(VISION), vision_model(VISION)
    vision.attach_adapters(clip, hidden_dim=3)
    state = with_memory(language_model(), vision_model=clip).adapter_state_dict()
    model = with_memory(language_model(), vision_model=other)
    before = _described(model)
    with pytest.raises(ValueError, match="missing key_position"):
        model.load_adapter_state_dict({name: t for name, t in state.items() if name != "key_position"})
    assert _described(model) == before


def test_unload_restores_the_vision_model(tmp_path: Path) -> None:
    clip = vision_model(VISION)
    vision.attach_adapters(clip, hidden_dim=3)
    with_memory(language_model(), vision_model=clip).save_pretrained(tmp_path)
    loaded_into = vision_model(VISION)
    next(loaded_into.parameters()).requires_grad_(False)
    before = _described(loaded_into)
    MemVPModel.from_pretrained(language_model(), tmp_path, loaded_into).unload()
    assert _described(loaded_into) == before
    own = vision.adapters(clip)[0]  # attached by the user, so they stay
    own.requires_grad_(False)
    before = _described(clip)
    with_memory(language_model(), vision_model=clip).unload()
    assert _described(clip) == before
    assert vision.adapters(clip)[0] is own


def test_options_pass_through(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    again = MemVPModel.from_pretrained(language_model(), tmp_path, backend="torch", recompute=True)
    assert (again.backend, again.recompute) == ("torch", True)


def test_missing_and_unexpected_names_are_all_named() -> None:
    model = wrapped()
    before = {n: t.clone() for n, t in model.adapter_state_dict().items()}
    state = {n: t + 1 for n, t in before.items()}
    state["extra"] = state.pop("key_position")
    with pytest.raises(ValueError, match=r"missing key_position; unexpected extra"):
        model.load_adapter_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in model.adapter_state_dict().items()), "nothing was loaded"


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no memvp_config\.json; it is not a folder that save_pretrained wrote"
    ):
        MemVPModel.from_pretrained(language_model(), tmp_path)
    CONFIG.save(tmp_path / "memvp_config.json")
    with pytest.raises(FileNotFoundError, match=r"has no memvp_model\.safetensors"):
        MemVPModel.from_pretrained(language_model(), tmp_path)
