"""Official checkpoints: everything lands where it belongs, or nothing is changed and the error says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.patching import vision_adapters as vision
from tests.models.clip import BLOCKS, INNER, official_state, pixels, save_official, vision_model
from tests.models.tiny import VISION, WIDTH, language_model, tokens

SLOTS, PROJECTOR = 10, 6
CONFIG = {"vision_dim": VISION, "projector_dim": PROJECTOR, "num_slots": SLOTS}


def a_model(clip: nn.Module | None = None, **config: Any) -> MemVPModel:
    return MemVPModel(language_model(), MemVPConfig(**CONFIG | config), clip)


def a_state() -> dict[str, Tensor]:
    return official_state(SLOTS, WIDTH, VISION, PROJECTOR)


def trained(model: MemVPModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_every_tensor_lands(tmp_path: Path, prefix: str) -> None:
    clip, state = vision_model(), a_state()
    model = a_model(clip)
    report = model.load_official_checkpoint(save_official(tmp_path / "c.pth", state, prefix=prefix))

    assert torch.equal(model.key_position, state["adapter_emb1"][0])
    assert torch.equal(model.value_position, state["adapter_emb2"][0])
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert torch.equal(model.projector.get_parameter(name), state[f"adapter_proj.{name}"])
    for block in range(BLOCKS - 1):
        adapter = clip.encoder.layers[block].mlp.adapter_mlp
        for name in ("fc1.weight", "fc2.weight"):
            key = f"backbone.visual.transformer.resblocks.{block}.adapter_mlp.{name}"
            assert torch.equal(adapter.get_parameter(name), state[key])
            assert model.get_parameter(report.loaded[key]) is adapter.get_parameter(name)

    assert set(report.loaded) | set(report.unused) == set(state)
    assert not set(report.loaded) & set(report.unused)
    assert "never reads it" in report.unused["adapter_modality_embedding.weight"]
    last = f"backbone.visual.transformer.resblocks.{BLOCKS - 1}.adapter_mlp.fc1.weight"
    assert "never run" in report.unused[last]
    assert report.epoch == 19
    assert report.settings["adapter_scale"] == 0.1
    assert all(key in str(report) for key in state)


def test_loaded_adapters_train_and_are_saved(tmp_path: Path) -> None:
    model = a_model(vision_model())
    model.load_official_checkpoint(save_official(tmp_path / "c.pth", a_state()))
    assert sum("adapter_mlp" in name for name in trained(model)) == 2 * (BLOCKS - 1)
    model.save_pretrained(tmp_path / "adapter")
    again = MemVPModel.from_pretrained(language_model(), tmp_path / "adapter", vision_model())
    with torch.no_grad():
        logits = [m.eval()(input_ids=tokens(2), pixel_values=pixels(2)).logits for m in (model, again)]
    assert torch.equal(*logits)


def test_adapters_attached_before_are_filled(tmp_path: Path) -> None:
    clip = vision_model()
    before = vision.attach_adapters(clip, hidden_dim=INNER)
    a_model(clip).load_official_checkpoint(save_official(tmp_path / "c.pth", a_state()))
    assert [id(a) for a in vision.adapters(clip)] == [id(a) for a in before]
    assert all(a.fc2.weight.abs().max() > 0 for a in before)


def test_positions_keep_a_double_models_dtype(tmp_path: Path) -> None:
    model = MemVPModel(language_model().double(), MemVPConfig(**CONFIG))
    model.load_official_checkpoint(save_official(tmp_path / "c.pth", a_state()), vision_adapters=False)
    assert model.key_position.dtype == torch.float64


@pytest.mark.parametrize(
    ("slots", "width", "trainable"), [(320, 4096, 3_879_040), (400, 5120, 5_487_744)], ids=["7B", "13B"]
)
def test_the_official_sizes(tmp_path: Path, slots: int, width: int, trainable: int) -> None:
    """Shapes alone: the language model and CLIP exist without storage."""
    state = official_state(slots, width, 1024, 128, blocks=24, inner=12)
    assert sum(tensor.numel() for tensor in state.values()) == trainable
    with torch.device("meta"):
        clip = vision_model(1024, num_hidden_layers=24, intermediate_size=8, num_attention_heads=16)
        base = tiny_llama(width)
    model = MemVPModel(base, MemVPConfig(num_slots=slots), clip)
    model.memory.to_empty(device="cpu")
    for adapter in vision.attach_adapters(clip):
        adapter.to_empty(device="cpu")
    report = model.load_official_checkpoint(save_official(tmp_path / "c.pth", state))
    assert torch.equal(model.value_position, state["adapter_emb2"][0])
    assert torch.equal(model.projector.fc2.weight, state["adapter_proj.fc2.weight"])
    key = "backbone.visual.transformer.resblocks.22.adapter_mlp.fc2.weight"
    assert torch.equal(model.get_parameter(report.loaded[key]), state[key])
    assert len(report.loaded) == 6 + 2 * 23


def tiny_llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=32)
    )


def test_a_checkpoint_of_another_size_names_both(tmp_path: Path) -> None:
    path = save_official(tmp_path / "c.pth", official_state(400, 5120, 1024, 128))
    with torch.device("meta"):
        model = MemVPModel(tiny_llama(4096), MemVPConfig())
    with pytest.raises(
        ValueError, match=r"width 5120 with 400 slots \(LLaMA-13B\).*width 4096 with 320 slots \(LLaMA-7B\)"
    ):
        model.load_official_checkpoint(path)


def refused(tmp_path: Path, model: MemVPModel, state: dict[str, Tensor], match: str) -> None:
    before, kinds = trained(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        model.load_official_checkpoint(save_official(tmp_path / "c.pth", state))
    after = trained(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in model.modules()] == kinds


def with_adapters(**options: Any) -> nn.Module:
    clip = vision_model()
    vision.attach_adapters(clip, **options)
    return clip


REFUSED: dict[str, tuple[Callable[[], MemVPModel], str]] = {
    "slots": (lambda: a_model(num_slots=11), r"width 32 with 10 slots, this model is width 32 with 11 slots.*num_slots=10"),
    "no vision model": (a_model, "no vision_model.*vision_adapters=False"),
    "fewer blocks": (lambda: a_model(vision_model(num_hidden_layers=2)), "6 adapter tensors for 3 CLIP blocks, vision_model has 2"),
    "another width": (lambda: a_model(with_adapters(hidden_dim=INNER + 1)), r"fc1.weight is \(4, 12\), wanted \(5, 12\)"),
    # The official code's is 0.1; it is in no file, and loading would not show it.
    "another scale": (
        lambda: a_model(with_adapters(hidden_dim=INNER, scale=0.2)), r"not trained with scale=0\.2; call detach_adapters.*scale=0\.1"
    ),
    "memory_scale": (lambda: a_model(memory_scale=1.0), r"memory_scale=1\.0; build the model with MemVPConfig\(memory_scale=0\.1\)"),
    "feature_scale": (lambda: a_model(feature_scale=1.0), r"MemVPConfig\(feature_scale=0\.01\)"),
    "shared_positions": (lambda: a_model(shared_positions=False), r"MemVPConfig\(shared_positions=True\)"),
    "layers": (lambda: a_model(layers=(0,)), r"MemVPConfig\(layers=None\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_with_the_way_out(what: str, tmp_path: Path) -> None:
    make, match = REFUSED[what]
    refused(tmp_path, make(), a_state(), match)


def test_missing_and_unknown_keys_are_refused(tmp_path: Path) -> None:
    state = a_state() | {"layers.0.lora_A": torch.ones(1)}
    refused(tmp_path, a_model(), state, r"unknown keys \['layers.0.lora_A'\]")
    state = a_state()
    del state["adapter_proj.fc1.bias"]
    refused(tmp_path, a_model(), state, r"lacks \['adapter_proj.fc1.bias'\]")


def test_clip_adapters_can_be_left_out(tmp_path: Path) -> None:
    report = a_model().load_official_checkpoint(save_official(tmp_path / "c.pth", a_state()), vision_adapters=False)
    assert len(report.loaded) == 6
    assert sum("vision_adapters=False" in reason for reason in report.unused.values()) == 2 * BLOCKS


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": a_state(), "args": Payload()}, "c.pth")
    with pytest.raises(ValueError, match="can be read safely"):
        a_model().load_official_checkpoint("c.pth")
    assert not Path("executed").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.pth"):
        a_model().load_official_checkpoint(tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="safely"):
        a_model().load_official_checkpoint(tmp_path / "text.pth")
    torch.save({"weights": a_state()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"wanted a dict with 'model' in it, got \['weights'\]"):
        a_model().load_official_checkpoint(tmp_path / "other.pth")
