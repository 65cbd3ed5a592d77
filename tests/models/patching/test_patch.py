"""Only this instance changes, nothing about it that others go by, and unload() takes everything back."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memvp_kernels import MemVPModel
from memvp_kernels.models.patching.patch import Patch
from tests.models.tiny import (
    CONFIG,
    FAMILIES,
    IMAGES,
    KINDS,
    features,
    inputs,
    language_model,
    tokens,
    with_memory,
    wrapped,
)


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that unload() promises: modules and their order, classes, attributes, parameters and their flags."""
    return {
        "modules": [(name, id(module), type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "state": [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_restores_exactly(family: str) -> None:
    base = language_model(family)
    next(base.parameters()).requires_grad_(False)  # the flags come back as they were, not all True
    before, wanted = _fingerprint(base), base(**inputs()).logits
    model = with_memory(base)
    with torch.no_grad():
        assert not torch.equal(model(image_features=IMAGES, **inputs()).logits, wanted)
    assert not any(p.requires_grad for p in base.parameters())
    assert model.unload() is base
    assert _fingerprint(base) == before
    assert torch.equal(base(**inputs()).logits, wanted)
    assert model.unload() is base, "a second unload does nothing"
    with pytest.raises(RuntimeError, match="was unloaded"):
        model(**inputs())
    assert _fingerprint(with_memory(base).unload()) == before, "it can be wrapped again"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_parameters_and_classes_stay(family: str) -> None:
    base, plain = language_model(family), language_model(family)
    model = MemVPModel(base, CONFIG)
    assert list(base.state_dict()) == list(plain.state_dict())
    assert [type(m).__name__ for m in base.modules()] == [type(m).__name__ for m in plain.modules()]
    assert {n for n in model.state_dict() if not n.startswith("language_model.")} == {
        f"memory.{n}" for n in model.memory.state_dict()
    }
    assert base._no_split_modules == plain._no_split_modules and base.loss_type == plain.loss_type


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_second_model_never_notices(family: str) -> None:
    other = language_model(family)
    before, wanted = _fingerprint(other), other(**inputs()).logits
    wrapped(family)(image_features=IMAGES, **inputs())
    assert _fingerprint(other) == before
    assert torch.equal(other(**inputs()).logits, wanted)
    assert not any(isinstance(m, Patch) for m in language_model(family).modules())


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_base_alone_is_still_the_base(family: str) -> None:
    """Calling language_model itself runs it without memory, also after a run with memory and after one that failed."""
    base = language_model(family)
    with torch.no_grad():
        wanted = base(**inputs()).logits
        model = with_memory(base)
        model(image_features=IMAGES, **inputs())
        assert torch.equal(model.language_model(**inputs()).logits, wanted)
        with pytest.raises(ValueError, match="visual_index"):
            model(image_features=features(4), visual_index=torch.tensor([0, 0, 7]), **inputs())
        assert torch.equal(model.language_model(**inputs()).logits, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_starts_in_the_bases_mode(training: bool) -> None:
    model = MemVPModel(language_model().train(training), CONFIG)
    assert {m.training for m in model.modules()} == {training}


@pytest.mark.parametrize("family", KINDS)
def test_deepcopy_is_independent(family: str) -> None:
    model = wrapped(family)
    other = copy.deepcopy(model)
    images = IMAGES
    with torch.no_grad():
        wanted = model(image_features=images, **inputs()).logits
        assert torch.equal(other(image_features=images, **inputs()).logits, wanted)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        assert not torch.equal(other(image_features=images, **inputs()).logits, wanted)
        assert torch.equal(model(image_features=images, **inputs()).logits, wanted)
        other.unload()
        assert torch.equal(model(image_features=images, **inputs()).logits, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mt5", "bart"])
def test_pickle(family: str) -> None:
    model, images = wrapped(family), IMAGES
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        wanted = model(image_features=images, **inputs()).logits
        for other in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(image_features=images, **inputs()).logits, wanted)
            assert type(other.unload()) is type(language_model(family))


def test_pickle_into_a_fresh_process(tmp_path: Path) -> None:
    """The classes exist nowhere by name; a process that never wrapped a model makes them again."""
    model, images = wrapped("bart"), IMAGES
    with torch.no_grad():
        wanted = model(image_features=images, **inputs()).logits
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, images, inputs(), wanted)))
    code = (
        "import pickle, sys, torch\n"
        "model, images, inputs, wanted = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(image_features=images, **inputs).logits, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pkl")], check=True, timeout=120)


def test_a_memory_that_finds_no_room_leaves_the_model_alone() -> None:
    base = language_model()
    before = _fingerprint(base)
    with pytest.raises(RuntimeError):
        MemVPModel(base, dataclasses.replace(CONFIG, num_slots=2**60))
    assert _fingerprint(base) == before


def test_wrapping_twice_is_refused() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="has memory already; call unload"):
        MemVPModel(model.language_model, CONFIG)


def test_a_forward_on_a_layer_is_refused() -> None:
    """It would call the forward that it found, and drop the memory."""
    base = language_model()
    layer = base.model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1: a forward was set on this Llama\w+ instance.*Wrap the model before"
    ):
        MemVPModel(base, CONFIG)
    assert not any(isinstance(m, Patch) for m in base.modules()), "nothing was changed"
    assert all(p.requires_grad for p in base.parameters())


def test_a_hook_set_afterwards_keeps_the_memory() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, images = wrapped(), IMAGES
    with torch.no_grad():
        wanted = model(image_features=images, **inputs()).logits
        for layer in model.language_model.model.layers:
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
            hooks.add_hook_to_module(layer.mlp, hooks.AlignDevicesHook(execution_device="cpu"))
        hooks.add_hook_to_module(model.language_model, hooks.AlignDevicesHook(execution_device="cpu"))
        assert torch.equal(model(image_features=images, **inputs()).logits, wanted)
        assert model.generate(input_ids=tokens(3), image_features=images, max_new_tokens=2).shape == (3, 7)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("offload", [False, True])
def test_device_maps_beforehand(family: str, offload: bool) -> None:
    """A base dispatched by accelerate has a hook on every module; the memory goes inside, and comes out again."""
    accelerate = pytest.importorskip("accelerate")
    base = language_model(family)
    if offload:
        accelerate.cpu_offload(base, "cpu")
    else:
        accelerate.hooks.attach_execution_device_hook(base, "cpu")
    layers = [m for m in base.modules() if type(m).__name__.endswith(("DecoderLayer", "EncoderLayer", "Block"))]
    assert all("forward" in vars(layer) for layer in layers) or offload
    images = IMAGES
    with torch.no_grad():
        before = base(**inputs()).logits
        wanted = wrapped(family)(image_features=images, **inputs()).logits
        model = with_memory(base)
        torch.testing.assert_close(model(image_features=images, **inputs()).logits, wanted)
        got = model.generate(input_ids=tokens(3), image_features=images, max_new_tokens=2, num_beams=2)
        assert torch.equal(
            got, wrapped(family).generate(tokens(3), image_features=images, max_new_tokens=2, num_beams=2)
        )
        assert model.unload() is base
        assert torch.equal(base(**inputs()).logits, before)


def test_unload_under_a_hook_set_afterwards() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = wrapped()
    wanted = language_model()(**inputs()).logits
    hooks.attach_execution_device_hook(model.language_model, "cpu")
    assert torch.equal(model.unload()(**inputs()).logits, wanted)


def test_unload_after_another_class_change_is_refused_whole() -> None:
    model = wrapped()
    layer = model.language_model.model.layers[1]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(RuntimeError, match="Sharded has been given another class since"):
        model.unload()
    images = IMAGES
    assert torch.equal(
        model(image_features=images, **inputs()).logits, wrapped()(image_features=images, **inputs()).logits
    )
    layer.__class__ = type(layer).__mro__[1]
    assert type(model.unload()) is type(language_model())


def test_save_pretrained_of_the_base_names_its_own_class(tmp_path: Path) -> None:
    model = wrapped()
    model.language_model.save_pretrained(tmp_path)
    again = type(language_model()).from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(again.state_dict(), language_model().state_dict(), rtol=0, atol=0)
