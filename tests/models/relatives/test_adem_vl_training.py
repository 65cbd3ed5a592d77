"""ADEM-VL under the tools that train: Trainer, activation checkpointing, several threads, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.trainer import MemVPTrainer
from memvp_kernels.serving.vllm.folder import export, save_for_vllm
from tests.models.clip import BLOCKS, adem_vl_state, official_state, pixels, save_official, vision_model
from tests.models.relatives.adem import PREFIXED, batch, images, wrapped
from tests.models.test_threads import each_like_alone
from tests.models.tiny import VISION, WIDTH, language_model, one_layer, with_memory
from tests.models.tools import arguments
from tests.tolerance import assert_within_twice

PICTURES, LENGTHS = images(True, False, True), (5, 5, 4)


def _gradients(model: MemVPModel, inputs: dict[str, Any]) -> list[Tensor]:
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    return list(torch.autograd.grad(loss, list(model.memory.parameters())))


@pytest.mark.parametrize("option", ["checkpointing", "recompute"])
def test_less_memory_the_same_gradients(option: str) -> None:
    inputs = batch(PICTURES, LENGTHS)
    wanted = _gradients(wrapped(config=PREFIXED).train(), inputs)
    model = wrapped(config=PREFIXED, recompute=option == "recompute").train()
    if option == "checkpointing":
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(_gradients(model, inputs), wanted)


def test_tritons_kernels_are_as_close_as_pytorch() -> None:
    pytest.importorskip("triton")
    inputs = batch(PICTURES, LENGTHS)
    exact, theirs = (_gradients(wrapped(config=PREFIXED).to(d).train(), inputs) for d in (torch.float64, torch.float32))
    mine = _gradients(wrapped(config=PREFIXED, backend="triton").train(), inputs)
    for gradients in zip(mine, exact, theirs, strict=True):
        assert_within_twice(*gradients)


def test_threads_do_not_meet() -> None:
    model = wrapped(config=PREFIXED)
    there = ((True, True, False), (False, False, True), (True, True, True))
    batches = [batch(images(*which, seed=seed), LENGTHS) for seed, which in enumerate(there, start=1)]
    with torch.no_grad():
        each_like_alone(model, [lambda b=b: model(**b).logits for b in batches])


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """One graph, whichever images are missing."""
    model = with_memory(one_layer(), PREFIXED)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for there in ((True, False, True), (False, True, True)):
        inputs = batch(images(*there), LENGTHS)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_trains_evaluates_and_saves(tmp_path: Path, smoothing: float) -> None:
    model = wrapped(config=PREFIXED).train()
    data = [{"row": i} for i in range(3)]

    def collate(samples: list[dict[str, int]]) -> dict[str, Any]:
        inputs = batch([PICTURES[s["row"]] for s in samples], [LENGTHS[s["row"]] for s in samples])
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    args = arguments(
        tmp_path, max_steps=2, per_device_train_batch_size=3, save_strategy="steps", save_steps=2, learning_rate=1e-2,
        remove_unused_columns=False, label_smoothing_factor=smoothing, max_grad_norm=0.0,
    )  # fmt: skip
    before = model.adapter_state_dict()["class_projector.fc2.weight"].clone()
    trainer = MemVPTrainer(
        model,
        args,
        train_dataset=data,  # type: ignore[arg-type]
        eval_dataset=data,  # type: ignore[arg-type]
        data_collator=collate,
        compute_metrics=lambda p: {"same": float(p.predictions.shape[:2] == p.label_ids.shape)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_same"] == 1.0
    state = model.adapter_state_dict()
    assert not torch.equal(state["class_projector.fc2.weight"], before)
    again = MemVPModel.from_pretrained(language_model(), tmp_path / "checkpoint-2")
    assert again.memvp_config == PREFIXED
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.adapter_state_dict().items())


def test_vllms_folder_is_refused(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="the plug-in serves MemVP's alone"):
        save_for_vllm(model, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    language_model().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="the plug-in serves MemVP's alone"):
        export(tmp_path / "base", tmp_path / "adapter", tmp_path / "served")
    assert not (tmp_path / "served").exists()


OFFICIAL = MemVPConfig.adem_vl(
    vision_dim=VISION, projector_dim=6, pooled_grids=(4, 1), image_prefix=(5, 6), text_prefix=(5, 6, 7)
)
SIZES = (5, WIDTH, VISION, 6)
SETTINGS = {"alpha": 0.1, "beta": 0.01, "drop_ratio": 0.1, "down_sample_num": [4, 1], "hidden_proj": 6}


def test_an_official_checkpoint_lands(tmp_path: Path) -> None:
    clip, state = vision_model(), adem_vl_state(*SIZES)
    model = MemVPModel(language_model(), OFFICIAL, clip)
    report = model.load_official_checkpoint(save_official(tmp_path / "c.pth", state, **SETTINGS))
    assert torch.equal(model.key_position, state["adapter_emb1"][0])
    for name, projector in (("proj", model.projector), ("proj_cls", model.memory.class_projector)):
        for part, parameter in projector.named_parameters():
            assert torch.equal(parameter, state[f"adapter_{name}.{part}"])
    assert set(report.loaded) | set(report.unused) == set(state)
    assert len(report.unused) == 2 and len(report.loaded) == 2 + 8 + 2 * (BLOCKS - 1)
    inputs = batch([None] * 3, (4, 4, 4))
    del inputs["image_features"]
    assert model(**inputs, labels=inputs["input_ids"], pixel_values=pixels(3)).loss.isfinite()


@pytest.mark.parametrize("settings", [SETTINGS, {}])
def test_an_official_checkpoint_without_class_token_lands(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = dataclasses.replace(OFFICIAL, class_token=False, image_prefix=(), text_prefix=())
    path = tmp_path / "c.pth"
    torch.save({"model": adem_vl_state(*SIZES, class_token=False)}, path)
    if settings:
        save_official(path, adem_vl_state(*SIZES, class_token=False), **settings)
    model = MemVPModel(language_model(), config)
    if not settings:  # then the paper's grids are what the file is taken for
        with pytest.raises(ValueError, match=r"pooled_grids=\(256, 64\)"):
            model.load_official_checkpoint(path, vision_adapters=False)
        return
    assert len(model.load_official_checkpoint(path, vision_adapters=False).loaded) == 6


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            {"visual_drop": 0.2},
            SETTINGS,
            r"not trained with visual_drop=0\.2;.*MemVPConfig\.adem_vl\(visual_drop=0\.1\)",
        ),
        ({}, SETTINGS | {"beta": 0.02}, r"adem_vl\(feature_scale=0\.02\)"),
        ({}, SETTINGS | {"alpha": 0.2}, r"adem_vl\(memory_scale=0\.2\)"),
        ({}, SETTINGS | {"down_sample_num": [1, 4]}, r"adem_vl\(pooled_grids=\(1, 4\)\)"),
        ({"visual_map": None}, SETTINGS, r"adem_vl\(visual_map='silu'\)"),
        ({"class_token": False, "image_prefix": (), "text_prefix": ()}, SETTINGS, r"adem_vl\(class_token=True\)"),
        ({"text_prefix": ()}, SETTINGS, 'trained with "Image: " in front of the class token.*text_prefix='),
    ],
)
def test_other_constants_are_refused(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    model = MemVPModel(language_model(), dataclasses.replace(OFFICIAL, **change))
    before = {name: t.clone() for name, t in model.adapter_state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_official_checkpoint(save_official(tmp_path / "c.pth", adem_vl_state(*SIZES), **settings))
    assert all(torch.equal(t, before[name]) for name, t in model.adapter_state_dict().items())


def test_the_methods_checkpoints_are_told_apart(tmp_path: Path) -> None:
    memvp = save_official(tmp_path / "memvp.pth", official_state(*SIZES))
    adem = save_official(tmp_path / "adem.pth", adem_vl_state(*SIZES), **SETTINGS)
    plain = MemVPConfig(vision_dim=VISION, projector_dim=6, num_slots=5)
    with pytest.raises(ValueError, match=r"build the model with MemVPConfig\.adem_vl\(.*visual_map='silu'"):
        MemVPModel(language_model(), plain).load_official_checkpoint(adem, vision_adapters=False)
    with pytest.raises(ValueError, match=r"build the model with MemVPConfig\(.*visual_map=None"):
        MemVPModel(language_model(), OFFICIAL).load_official_checkpoint(memvp, vision_adapters=False)
