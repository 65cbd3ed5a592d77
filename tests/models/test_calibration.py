"""Calibration, against explain_memory and the training that it makes possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memvp_kernels import MemVPConfig, MemVPModel
from tests.models.tiny import CONFIG, features, language_model, tokens

QUIET = replace(CONFIG, feature_scale=0.01, memory_scale=0.1)


def batch(model: MemVPModel) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": tokens(2), "image_features": features(4, 7)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(2, 3)
    return inputs


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bart"])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_every_layer_starts_at_the_wanted_share(family: str, share: float) -> None:
    torch.manual_seed(1)
    model = MemVPModel(language_model(family), replace(QUIET, shared_positions=family != "bart"))
    inputs = batch(model)
    before = model.explain_memory(**inputs)
    found = model.calibrate(**inputs, share=share)
    now = model.explain_memory(**inputs)
    assert [layer.name for layer in now.layers] == list(found.names)
    for number, (old, layer) in enumerate(zip(before.layers, now.layers, strict=True)):
        assert layer.share.mean().item() == pytest.approx(share, rel=2e-3)
        assert found.after[number] == pytest.approx(layer.share.mean().item())
        assert found.before[number] == pytest.approx(old.share.mean().item())
    assert found.memory_scale == model.memvp_config.memory_scale
    assert found.feature_scale == model.memvp_config.feature_scale


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_an_image_is_as_large_in_the_keys_as_wanted(ratio: float) -> None:
    model = MemVPModel(language_model(), QUIET)
    inputs = batch(model)
    model.calibrate(**inputs, key_ratio=ratio)
    image = model.memvp_config.feature_scale * model.projector(torch.cat(inputs["image_features"]))
    sizes = [t.detach().square().mean().sqrt().item() for t in (image, model.key_position)]
    assert sizes[0] == pytest.approx(ratio * sizes[1], rel=1e-5)


def test_padding_and_what_has_no_image_do_not_count() -> None:
    model = MemVPModel(language_model(), QUIET)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    ids = tokens(1)
    alone = model.calibrate(ids, mask, image_features=features(4))
    other = ids.clone()
    other[0, :2] = (other[0, :2] + 1) % 40
    assert model.calibrate(other, mask, image_features=features(4)).memory_scale == pytest.approx(alone.memory_scale)


def test_a_calibrated_adapter_survives_its_files(tmp_path: Path) -> None:
    model = MemVPModel(language_model(), replace(QUIET, layers=(1,)))
    inputs = batch(model)
    model.calibrate(**inputs)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = MemVPModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.memvp_config == model.memvp_config
    assert len(loaded.memvp_config.memory_scale) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=0, atol=0)


def test_it_prints_a_table() -> None:
    model = MemVPModel(language_model(), QUIET)
    printed = str(model.calibrate(**batch(model), share=0.25))
    assert printed.count("25.0%") == 2
    assert all(name in printed for name, _ in model.memory_ffns())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "share: wanted a number between 0 and 1, got 1.0"),
        ({"key_ratio": 0.0}, "key_ratio: wanted a number between 0 and inf, got 0.0"),
        ({"image_features": None}, "wanted a batch with images, got none"),
        ({"image_features": [None, None]}, "wanted a batch with images, got none"),
    ],
)
def test_refused_and_nothing_is_changed(changes: dict[str, Any], message: str) -> None:
    model = MemVPModel(language_model(), QUIET)
    with pytest.raises(ValueError, match=message):
        model.calibrate(**batch(model) | changes)
    assert model.memvp_config == QUIET
    assert model.memory.config == QUIET


def test_scales_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="memory_scale: wanted 2 numbers, one per layer, got 3"):
        MemVPModel(language_model(), MemVPConfig(memory_scale=(0.1, 0.1, 0.1)))
