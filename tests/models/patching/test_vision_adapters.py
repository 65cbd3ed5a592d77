"""Image features as the official code selects them, and the adapters inside CLIP."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.models.memory import vision_tower
from memvp_kernels.models.memory.images import encode_pixels, pad_features
from memvp_kernels.models.patching import vision_adapters as vision
from tests.models.clip import BLOCKS, pixels, vision_model


def by_hooks(
    model: torch.nn.Module, images: Tensor, adapters: list[vision.ClipAdapter], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The last-but-one hidden state that transformers itself reports, the adapters' outputs added by hooks."""
    handles = []
    for layer, adapter in zip(model.encoder.layers, adapters, strict=False):
        w1, w2 = adapter.fc1.weight.to(dtype), adapter.fc2.weight.to(dtype)
        handles.append(layer.mlp.register_forward_hook(
            lambda _, args, out, w1=w1, w2=w2: out + 0.1 * (F.gelu(args[0] @ w1.T) @ w2.T)
        ))  # fmt: skip
    hidden = model(images, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert len(hidden) == BLOCKS + 1
    return model.post_layernorm(hidden[-2][:, 1:])


def randomise(adapters: list[vision.ClipAdapter]) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for adapter in adapters:
            adapter.fc1.weight.normal_()
            adapter.fc2.weight.normal_()


def test_features_are_the_official_ones() -> None:
    model = vision_model()
    features = vision_tower.encode(model, pixels(2))
    assert features.shape == (2, 4, 12)
    torch.testing.assert_close(features, by_hooks(model, pixels(2), []))


def test_the_last_block_is_not_run() -> None:
    model = vision_model()
    before = vision_tower.encode(model, pixels(1))
    model.encoder.layers[-1].register_forward_hook(lambda *_: pytest.fail("the last block ran"))
    torch.testing.assert_close(vision_tower.encode(model, pixels(1)), before, rtol=0, atol=0)


def test_new_adapters_change_nothing_and_trained_ones_add_their_output() -> None:
    model, images = vision_model(), pixels(2)
    plain = vision_tower.encode(model, images)
    own_names = list(dict(model.named_parameters()))
    adapters = vision.attach_adapters(model, hidden_dim=4)
    assert len(adapters) == BLOCKS - 1
    assert [name for name, _ in model.named_parameters() if "adapter_mlp" not in name] == own_names
    assert all(p.dtype == torch.float32 and p.requires_grad for a in adapters for p in a.parameters())
    torch.testing.assert_close(vision_tower.encode(model, images), plain, rtol=0, atol=0)

    randomise(adapters)
    adapted = vision_tower.encode(model, images)
    assert (adapted - plain).abs().max() > 0.01
    torch.testing.assert_close(adapted, by_hooks(vision_model(), images, adapters))


def test_adapters_are_of_one_instance_and_come_off() -> None:
    model, other, images = vision_model(), vision_model(), pixels(1)
    kinds, keys, plain = (
        [type(m) for m in model.modules()],
        list(model.state_dict()),
        vision_tower.encode(model, images),
    )
    randomise(vision.attach_adapters(model))
    torch.testing.assert_close(vision_tower.encode(other, images), plain, rtol=0, atol=0)
    assert not vision.adapters(other)
    vision.detach_adapters(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert not vision.adapters(model)
    torch.testing.assert_close(vision_tower.encode(model, images), plain, rtol=0, atol=0)
    vision.detach_adapters(model)


def test_adapters_are_refused_twice() -> None:
    model = vision_model()
    vision.attach_adapters(model)
    with pytest.raises(ValueError, match="adapters already"):
        vision.attach_adapters(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_adapters_are_copied(copied: object) -> None:
    model = vision_model()
    randomise(vision.attach_adapters(model))
    other = copied(model)  # type: ignore[operator]
    torch.testing.assert_close(
        vision_tower.encode(other, pixels(1)), vision_tower.encode(model, pixels(1)), rtol=0, atol=0
    )
    assert other.encoder.layers[0].mlp.adapter_mlp is not model.encoder.layers[0].mlp.adapter_mlp


def test_dropout_is_on_in_training_only() -> None:
    model, images = vision_model(), pixels(1)
    randomise(vision.attach_adapters(model, dropout=0.5))
    assert torch.equal(vision_tower.encode(model, images), vision_tower.encode(model, images))
    model.train()
    assert not torch.equal(vision_tower.encode(model, images), vision_tower.encode(model, images))


def test_gradients_reach_the_adapters_alone() -> None:
    model = vision_model()
    randomise(vision.attach_adapters(model))
    model.requires_grad_(False)
    for adapter in vision.adapters(model):
        adapter.requires_grad_(True)
    vision_tower.encode(model, pixels(2)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {name for name, _ in model.named_parameters() if "adapter_mlp" in name}


def test_float32_adapters_under_a_bfloat16_model() -> None:
    """No further from float32 than twice what plain operations in bfloat16 are."""
    model, images = vision_model(), pixels(2)
    adapters = vision.attach_adapters(model)
    randomise(adapters)
    exact = vision_tower.encode(model, images)
    for name, parameter in model.named_parameters():
        if "adapter_mlp" not in name:
            parameter.data = parameter.data.bfloat16()
    features = vision_tower.encode(model, images)
    assert features.dtype == torch.bfloat16
    plain = by_hooks(vision_model().bfloat16(), images.bfloat16(), adapters, torch.bfloat16)
    assert (features.float() - exact).norm() <= 2 * (plain.float() - exact).norm()


def test_a_batch_with_no_one_and_several_images() -> None:
    model, images = vision_model(), pixels(4)
    each = vision_tower.encode(model, images)
    batch = encode_pixels(model, [images[0], None, images[1:3], images[3:3]])
    rows, valid = pad_features(
        batch, samples=4, vision_dim=12, num_slots=9, dtype=torch.float32, device=torch.device("cpu")
    )
    assert valid.sum(dim=1).tolist() == [4, 0, 8, 0]
    torch.testing.assert_close(rows[0, :4], each[0])
    torch.testing.assert_close(rows[2], torch.cat([each[1], each[2]]))
    assert encode_pixels(model, [None, None]) == [None, None]
    whole = encode_pixels(model, images)
    assert isinstance(whole, Tensor)
    torch.testing.assert_close(whole, each)


def test_bad_input_says_what_was_wanted() -> None:
    model = vision_model()
    with pytest.raises(TypeError, match=r"CLIPVisionModel, got Linear.*image_features="):
        vision_tower.encode(torch.nn.Linear(2, 2), pixels(1))
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.uint8"):
        vision_tower.encode(model, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got shape \(3, 8, 8\)"):
        vision_tower.encode(model, pixels(1)[0])
    with pytest.raises(ValueError, match=r"pixel_values\[1\].*got \(8, 8\)"):
        encode_pixels(model, [None, pixels(1)[0, 0]])
    with pytest.raises(TypeError, match=r"pixel_values\[0\]: wanted a tensor or None, got str"):
        encode_pixels(model, ["image.png"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="images of one size"):
        encode_pixels(model, [pixels(1)[0], torch.zeros(3, 4, 8)])
