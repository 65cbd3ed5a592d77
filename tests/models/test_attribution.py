"""What explain_memory reports, against the same quantities measured on the FFNs from outside."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvp_kernels import MemVPModel
from tests.models.tiny import CONFIG, features, language_model, tokens, with_memory, wrapped

SLOTS = CONFIG.num_slots


def observed(model: MemVPModel, **inputs: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """(x, y) of every FFN with memory."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), model.observing(lambda layer, x, y: seen.update({layer: (x, y)})):
        model(**inputs)
    return seen


def audible(family: str) -> Any:
    """A language model in float64 whose FFNs are not drowned by the memory."""
    base = language_model(family).double()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 or family.startswith("t5") else 8.0)
    return base


def plain_ffn(module: nn.Module, x: Tensor) -> Tensor:
    """An untouched FFN's output."""
    if hasattr(module, "fc1"):
        return module.fc2(module.activation_fn(module.fc1(x)))
    return module(x)


def materialised(model: MemVPModel, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kv and Vv (M, d) from the parameters, as the paper writes them."""
    f = torch.zeros_like(model.key_position)
    if image is not None:
        f[: len(image)] = CONFIG.feature_scale * model.projector(image.to(f.dtype))
    return f + model.key_position, f + model.value_position


ADEM = {"visual_map": "silu", "visual_drop": 0.3, "visual_activation": "identity"}


@pytest.mark.parametrize(
    ("family", "method"), [("llama", {}), ("llama", ADEM), ("t5-gated", {}), ("bart", {})], ids=str
)
def test_shares_are_what_the_memory_adds(family: str, method: dict[str, Any]) -> None:
    base, plain = audible(family), audible(family)
    model = with_memory(base, dataclasses.replace(CONFIG, **method))
    inputs: dict[str, Any] = {"input_ids": tokens(2), "image_features": features(4, 0)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(2, 3)
    seen = observed(model, **inputs)
    explained = model.explain_memory(**inputs)
    assert [layer.name for layer in explained.layers] == [name for name, _ in model.memory_ffns()]
    for number, layer in enumerate(explained.layers):
        x, y = seen[number]
        with torch.no_grad():
            own = plain_ffn(plain.get_submodule(layer.name), x)
        added = (y - own).norm(dim=-1)
        expected = added / (added + own.norm(dim=-1))
        assert layer.share.shape == x.shape[:2]
        torch.testing.assert_close(layer.share, expected.float())
        assert 0.05 < layer.share.mean() < 0.95


def test_slots_are_each_slots_own_addition() -> None:
    model = with_memory(language_model().double())
    images = features(4, 0)
    explained = model.explain_memory(tokens(2), image_features=images)
    seen = observed(model, input_ids=tokens(2), image_features=images)
    for number, layer in enumerate(explained.layers):
        x = seen[number][0]
        for sample, image in enumerate(images):
            with torch.no_grad():
                key, value = materialised(model, image)
                each = CONFIG.memory_scale * F.silu(x[sample] @ key.T).unsqueeze(-1) * value  # [T, M, d]
            torch.testing.assert_close(layer.slots[sample], each.norm(dim=-1).float())


def test_sums_and_tops() -> None:
    model = wrapped()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    explained = model.explain_memory(tokens(2), mask, image_features=features(4, 3))
    first = explained.layers[0]
    assert torch.equal(first.valid, mask.bool())
    torch.testing.assert_close(first.mean_share()[1], first.share[1, 2:].mean())
    torch.testing.assert_close(first.mean_slots()[1], first.slots[1, 2:].mean(dim=0))
    assert explained.shares().shape == (2, 2)
    torch.testing.assert_close(explained.slots(), sum(layer.mean_slots() for layer in explained.layers))
    norms, indices = explained.top(3)
    assert norms.shape == indices.shape == (2, 3)
    assert indices[0].tolist() == sorted(range(SLOTS), key=lambda j: -explained.slots()[0, j])[:3]
    norms, indices = first.top(SLOTS)
    torch.testing.assert_close(norms, first.slots.gather(-1, indices))
    assert (norms.diff(dim=-1) <= 0).all()
    with pytest.raises(ValueError, match=rf"k must be in \[1, {SLOTS}\].*got 0"):
        explained.top(0)
    assert all(layer.name in str(explained) for layer in explained.layers)


def test_padding_does_not_count() -> None:
    model = wrapped()
    short, images = tokens(1, 3), features(4)
    alone = model.explain_memory(short, image_features=images)
    padded = F.pad(short, (2, 0))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    beside = model.explain_memory(padded, mask, image_features=images, position_ids=torch.tensor([[0, 0, 0, 1, 2]]))
    torch.testing.assert_close(beside.shares(), alone.shares())


def test_visual_tokens_come_from_features_cores_and_indices() -> None:
    model = wrapped()
    images = features(4, 0, 7)
    assert model.explain_memory(tokens(3), image_features=images).visual_tokens.tolist() == [4, 0, 7]
    core, index = model.encode_images(images), torch.tensor([2, 2, 0, -1])
    explained = model.explain_memory(tokens(4), visual_core=core, visual_index=index)
    assert explained.visual_tokens.tolist() == [7, 7, 4, 0]
    assert (explained.shares()[3] == 0).all()
    assert (explained.shares()[:3] > 0).all()
    assert (explained.layers[0].slots[3] == 0).all()


def test_an_untrained_memory_without_an_image_adds_nothing() -> None:
    from memvp_kernels import MemVPModel

    model = MemVPModel(language_model(), CONFIG)
    assert (model.explain_memory(tokens(2)).shares() == 0).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_training_mode_changes_nothing(family: str, attention: str) -> None:
    """Nothing is dropped, and no module is seen in another mode, as by a thread that trains meanwhile."""
    base = language_model(family)
    base.set_attn_implementation(attention)
    for module in base.modules():
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = with_memory(base, dataclasses.replace(CONFIG, dropout=0.5))
    inputs: dict[str, Any] = {"input_ids": tokens(1), "image_features": features(4)}
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(1, 3)
    wanted = model.eval().explain_memory(**inputs).slots()
    model.train()
    modes: set[bool] = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    torch.testing.assert_close(model.explain_memory(**inputs).slots(), wanted)
    assert modes == {True}
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second), "dropout is on again"


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (3, 8, 8)])
def test_the_plot_shows_the_image_its_patches_and_the_shares(tmp_path: Path, shape: tuple[int, ...]) -> None:
    explained = wrapped().explain_memory(tokens(2), image_features=features(4, 0))
    figure = explained.plot(torch.rand(shape), path=tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 5_000
    assert len(figure.axes) == 1 + 2 + 1
    heat = figure.axes[1].images[1].get_array()
    assert heat.shape == (2, 2)
    torch.testing.assert_close(torch.as_tensor(heat.data.copy()).flatten(), explained.layers[0].mean_slots()[0, :4])
    assert "free slots" in figure.axes[1].get_title()
    widths = [bar.get_width() for bar in figure.axes[3].containers[1]]
    torch.testing.assert_close(torch.tensor(widths), explained.shares()[0].double(), check_dtype=False)


def test_the_plot_refuses_what_it_cannot_draw() -> None:
    explained = wrapped().explain_memory(tokens(3), image_features=features(4, 0, 6))
    with pytest.raises(ValueError, match="no image"):
        explained.plot(torch.rand(8, 8), sample=1)
    with pytest.raises(ValueError, match=r"6 visual tokens are no square.*grid="):
        explained.plot(torch.rand(8, 8), sample=2)
    assert explained.plot(torch.rand(8, 8), sample=2, grid=(2, 3), layers=[1])
    with pytest.raises(ValueError, match=r"grid \(2, 2\) has 4 patches, the sample has 6"):
        explained.plot(torch.rand(8, 8), sample=2, grid=(2, 2))
