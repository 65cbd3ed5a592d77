"""ADEM-VL in a forward: the official formulas in outputs and gradients, and columns that stay as given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.patching.vision_adapters import attach_adapters
from tests.models.clip import adem_vl_state, pixels, vision_model
from tests.models.relatives.adem import BOS, CONFIG, GRIDS, PREFIXED, batch, images, official_forward, rows, wrapped
from tests.models.tiny import VISION, WIDTH, language_model

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
PICTURES, LENGTHS = images(True, False, True, True), (6, 5, 3, 6)


def _logits(model: MemVPModel, inputs: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, **options).logits
    return logits


@pytest.mark.parametrize(
    ("family", "config", "left"),
    [(family, CONFIG, False) for family in DECODERS]
    + [("llama", PREFIXED, False), ("llama", PREFIXED, True), ("gemma3", PREFIXED, True)]
    + [("llama", dataclasses.replace(PREFIXED, text_prefix=()), False)],
)
def test_outputs_and_gradients_are_the_official_formulas(family: str, config: MemVPConfig, left: bool) -> None:
    model = wrapped(family, config).double()
    # transformers' Gemma 2 gives NaN in float64 to a row that begins with padding
    pictures = images(*[True] * 4) if family == "gemma2" else PICTURES
    inputs = batch(pictures, LENGTHS, left=left)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    wanted, official = official_forward(language_model(family), model, rows(inputs), pictures)
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        torch.testing.assert_close(out.logits[i][mask], wanted[i])
    predicted = torch.cat([row[:-1] for row in wanted])
    predicted_ids = torch.cat([row[1:] for row in rows(inputs)])
    loss = F.cross_entropy(predicted, predicted_ids)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)  # transformers takes it in float32
    F.cross_entropy(
        torch.cat([out.logits[i][m][:-1] for i, m in enumerate(inputs["attention_mask"].bool())]), predicted_ids
    ).backward()
    gradients = torch.autograd.grad(loss, list(official.leaves.values()))
    for (name, parameter), gradient in zip(model.memory.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_the_presets_sizes_are_the_papers() -> None:
    """4,530,432 trainable parameters of LLaMA-7B less its CLIP adapters."""
    from memvp_kernels.models.memory.visual_memory import VisualMemory

    config = MemVPConfig.adem_vl()
    counted = sum(p.numel() for p in VisualMemory(config, width=4096, layers=32).parameters())
    assert counted == 4_530_432 - 24 * 2 * 12 * 1024
    assert (config.num_slots, config.visual_drop, config.feature_scale, config.memory_scale) == (320, 0.1, 0.01, 0.1)
    assert config.dropout == 0.0
    for slots, width, total in ((320, 4096, 4_530_432), (320, 5120, 5_449_984)):
        official = adem_vl_state(slots, width, 1024, 128, blocks=24, inner=12)
        assert sum(t.numel() for t in official.values()) == total


def test_an_untrained_model_without_an_image_is_the_language_model() -> None:
    inputs = batch([None] * 3, (5, 3, 5))
    model, base = MemVPModel(language_model(), CONFIG), language_model()
    with torch.no_grad():
        wanted = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    got, mask = _logits(model, inputs), inputs["attention_mask"].bool()
    torch.testing.assert_close(got[mask], wanted[mask])
    torch.testing.assert_close(_logits(model, inputs | {"image_features": None}), got)
    with model.disable_memory():
        assert torch.equal(_logits(model, batch(images(True, True, True), (5, 3, 5))), wanted)


@pytest.mark.parametrize("grids", [(16, 4), (9,), (1,), ()])
def test_grids_are_pooled_from_the_patches(grids: tuple[int, ...]) -> None:
    """4 × 4 patches to grids that divide them and that don't; none: the patches, and free slots."""
    model = wrapped(config=dataclasses.replace(CONFIG, pooled_grids=grids, num_slots=20))
    image = images(True)[0]
    assert image is not None
    core = model.encode_images([image])
    token, rest = image[:1], image[1:].T.view(VISION, 4, 4)
    pooled = [F.adaptive_avg_pool2d(rest, int(cells**0.5)).flatten(1).T for cells in grids] or [image[1:]]
    memory = model.memory(core=core)
    count = sum(grids) or 16
    features = memory.core @ memory.basis
    torch.testing.assert_close(features[0, :count], CONFIG.feature_scale * model.projector(torch.cat(pooled)))
    assert not features[0, count:].any()
    assert memory.class_token.present.tolist() == [True]
    torch.testing.assert_close(memory.class_token.embedding, model.memory.class_projector(token))


def test_images_by_every_way_are_the_same() -> None:
    """A tensor, a list, kept cores, an index, pixels and lists of them."""
    clip = vision_model()
    config = dataclasses.replace(CONFIG, pooled_grids=(4, 1), num_slots=5)
    model = wrapped(config=config, vision_model=clip).double()
    inputs = batch([], (4, 4, 4))
    del inputs["image_features"]
    pictures = pixels(3).double()
    features = _clip_features(clip, pictures)
    wanted = _logits(model, inputs, image_features=features)
    torch.testing.assert_close(_logits(model, inputs, image_features=list(features)), wanted)
    torch.testing.assert_close(_logits(model, inputs, image_features=[[f] for f in features]), wanted)
    torch.testing.assert_close(_logits(model, inputs, pixel_values=pictures), wanted)
    torch.testing.assert_close(_logits(model, inputs, pixel_values=list(pictures)), wanted)
    with torch.no_grad():
        core = model.encode_images(features)
    assert core.shape == (3, 1 + 5, 8)
    torch.testing.assert_close(_logits(model, inputs, visual_core=core), wanted)
    index = torch.tensor([2, -1, 0])
    chosen = _logits(model, inputs, visual_core=core, visual_index=index)
    listed = _logits(model, inputs, pixel_values=[pictures[2], None, pictures[0]])
    torch.testing.assert_close(_logits(model, inputs, image_features=[features[2], None, features[0]]), listed)
    torch.testing.assert_close(chosen[[0, 2]], listed[[0, 2]])
    with model.disable_memory():  # an index of -1 reads no free slots either
        torch.testing.assert_close(chosen[1], _logits(model, inputs)[1])


@pytest.mark.parametrize("there", [(True, False), (False, False)])
def test_clips_adapters_train_and_get_zeros_where_no_image_is(there: tuple[bool, ...]) -> None:
    clip = vision_model()
    adapters = attach_adapters(clip)
    model = wrapped(config=dataclasses.replace(CONFIG, pooled_grids=(4, 1), num_slots=5), vision_model=clip).train()
    inputs = batch([], (4, 4)) | {"image_features": None}
    pictures = [image if t else None for image, t in zip(pixels(2), there, strict=True)]
    model(**inputs, labels=inputs["input_ids"], pixel_values=pictures).loss.backward()
    for parameter in [*(a.fc2.weight for a in adapters), *model.memory.class_projector.parameters()]:
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().max() > 0) == any(there)


def _clip_features(clip: Any, pictures: Tensor) -> Tensor:
    """transformers' own hidden states: the last-but-one block's under the post-layernorm, class token first."""
    with torch.no_grad():
        states = clip(pictures, output_hidden_states=True).hidden_states
    found: Tensor = clip.post_layernorm(states[-2])
    return found.detach()


def test_outputs_have_the_columns_as_given() -> None:
    model, inputs = wrapped(config=PREFIXED), batch(PICTURES, LENGTHS)
    whole = _logits(model, inputs)
    assert whole.shape[:2] == inputs["input_ids"].shape
    for keep, wanted in ((2, whole[:, -2:]), (100, whole), (torch.tensor([1, 4]), whole[:, [1, 4]])):
        torch.testing.assert_close(_logits(model, inputs, logits_to_keep=keep), wanted)
    with torch.no_grad():
        out = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True, return_dict=False)
        states = model.base_model(**inputs).last_hidden_state
    assert out[0].dim() == 0 and torch.equal(out[1], whole)
    assert {tuple(t.shape[:2]) for t in out[-1]} == {tuple(inputs["input_ids"].shape)}
    torch.testing.assert_close(model.language_model.lm_head(states), whole)


@pytest.mark.parametrize("left", [False, True])
def test_position_ids_of_a_caller_move_along(left: bool) -> None:
    model = wrapped(config=PREFIXED)
    inputs = batch(PICTURES, LENGTHS, left=left)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    moved = _logits(model, inputs, position_ids=positions + 3)
    torch.testing.assert_close(moved[mask.bool()], _logits(model, inputs)[mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_cache_is_continued_by_the_callers_columns() -> None:
    """A loop that a user writes: the mask and the cache are those of the tokens that it has seen."""
    model = wrapped(config=PREFIXED).double()
    inputs = batch(PICTURES, LENGTHS, left=True)
    whole, n = _logits(model, inputs), 4
    picture = {"image_features": inputs["image_features"]}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        out = model(input_ids=ids[:, :n], attention_mask=mask[:, :n], use_cache=True, **picture)
        steps = [out.logits]
        for i in range(n, ids.shape[1]):
            past = out.past_key_values
            out = model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=past, **picture)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask.bool()], whole[mask.bool()])


def test_a_memory_in_some_layers_or_with_positions_of_their_own() -> None:
    for change in ({"layers": (1,)}, {"shared_positions": False}):
        model = wrapped(config=dataclasses.replace(CONFIG, **change))
        inputs = batch(PICTURES, LENGTHS)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.memory.parameters())


def test_explain_memory_leaves_out_the_lowest() -> None:
    inputs = batch(PICTURES, LENGTHS)
    found = wrapped(config=PREFIXED).explain_memory(**inputs)
    for layer in found.layers:
        assert layer.slots.shape == (*inputs["input_ids"].shape, sum(GRIDS))
        assert ((layer.slots == 0).sum(-1) == int(CONFIG.visual_drop * sum(GRIDS))).all()
    assert found.visual_tokens.tolist() == [sum(GRIDS), 0, sum(GRIDS), sum(GRIDS)]


def test_a_plot_lays_the_grids_over_each_other() -> None:
    pytest.importorskip("matplotlib")
    config = dataclasses.replace(CONFIG, pooled_grids=(16, 4), num_slots=20)
    found = wrapped(config=config).explain_memory(**batch(PICTURES, LENGTHS))
    panel = found.plot(torch.zeros(8, 8)).axes[1]
    slots = found.layers[0].mean_slots()[0]
    coarse = slots[16:].view(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1) / 4
    torch.testing.assert_close(torch.tensor(panel.images[1].get_array()), slots[:16].view(4, 4) + coarse)
    with pytest.raises(ValueError, match="has no image"):
        found.plot(torch.zeros(8, 8), sample=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooled_grids": (8,)}, r"square grids, such as 256 and 64, got \[8\]"),
        ({"pooled_grids": (256, 64), "num_slots": 300}, "are 320 slots, num_slots is 300"),
        ({"class_token": False, "image_prefix": (1,)}, "pass class_token=True"),
        ({"visual_map": "relu"}, "visual_map must be None or one of silu, got 'relu'"),
        ({"visual_activation": "none"}, "visual_activation must be None or one of relu"),
        ({"visual_drop": 1.0}, r"visual_drop must be in \[0, 1\), got 1.0"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemVPConfig.adem_vl(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": [[*images(True, True)], None]}, r"image_features\[0\]: wanted one image per sample.*got 2"),
        ({"image_features": torch.zeros(2, 16, VISION)}, "a class token and a square grid of patches to pool, got 16"),
        ({"image_features": torch.zeros(2, 17, 3)}, r"wanted width vision_dim = 12, got \(2, 17, 3\)"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 3, WIDTH)}, "inputs_embeds: wanted input_ids alone"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask: wanted \(B, 3\).*got \(2, 1, 3, 3\)"),
    ],
)
def test_inputs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped()(**batch(images(True, True), (3, 3)) | change)


@pytest.mark.parametrize("family", ["t5-gated", "bart"])
def test_an_encoder_decoder_has_the_memory_alone(family: str) -> None:
    base = language_model(family)
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"class_token: wanted a decoder-only model.*pass class_token=False"):
        MemVPModel(base, CONFIG)
    assert [type(module) for module in base.modules()] == kinds
    model = wrapped(family, dataclasses.replace(CONFIG, class_token=False))
    patches = [None if image is None else image[1:] for image in images(True, False)]
    ids = batch([], (4, 4))["input_ids"]
    assert model(input_ids=ids, labels=ids, image_features=patches).loss.isfinite()


def test_the_class_token_goes_behind_the_models_bos() -> None:
    """Whether a prompt has one is read from its ids: the official prompts do, Qwen's don't."""
    model, image = wrapped(), images(True)
    ids = torch.tensor([[BOS, 20, 21]])
    seen: list[Tensor] = []
    model.language_model.model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0][0]))
    embed = model.language_model.get_input_embeddings()
    _logits(model, {"input_ids": ids, "image_features": image})
    _logits(model, {"input_ids": ids[:, 1:], "image_features": image})
    assert torch.equal(seen[0][[0, 2, 3]], embed(ids[0]))
    assert torch.equal(seen[1][1:], embed(ids[0, 1:]))
    assert torch.equal(seen[0][1], seen[1][0])
