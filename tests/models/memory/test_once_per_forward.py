"""The memory under a whole model: nothing of it is joined, cast or added once per layer, and a forward leaves nothing behind."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel
from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.shared_memory import SharedMemory
from tests.models.tiny import decoder, features, tokens, wrapped

WIDTH, SLOTS, RANK, IMAGES = 64, 20, 16, 3
_PASSES = ("aten::add", "aten::add_", "aten::fill_", "aten::copy_", "aten::sum")


def _base(layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": layers, "head_dim": WIDTH // 4}
    return decoder(tf.LlamaConfig, tf.LlamaForCausalLM, **sizes).to(dtype)


def _is_memory(shape: tuple[int, ...]) -> bool:
    return shape == (IMAGES, SLOTS, RANK) or shape[-2:] in ((RANK, WIDTH), (SLOTS, WIDTH), (RANK + SLOTS, WIDTH))


def _operations(step: Any) -> Counter[str]:
    """Passes over tensors of the memory's shapes in a training step, and its concatenations and clamps of any shape."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    found: Counter[str] = Counter()
    for event in profile.events() or ():
        memory = event.name in _PASSES and any(_is_memory(tuple(shape)) for shape in event.input_shapes if shape)
        found[event.name] += memory or event.name in ("aten::cat", "aten::clamp")
    return found


def _step(model: Any, **images: Any) -> None:
    ids = torch.randint(3, 40, (IMAGES, 7), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids, labels=ids, **images)
    if out.loss.requires_grad:
        out.loss.backward()


def _per_layer(dtype: torch.dtype, backend: str, shared: bool) -> dict[str, int]:
    """What each of two more layers adds, less what the language model's own part of it adds."""
    images = {"image_features": torch.randn(IMAGES, 5, 12), "visual_index": torch.tensor([1, 0, 2])}
    config = MemVPConfig(vision_dim=12, projector_dim=14, num_slots=SLOTS, dropout=0.0, shared_positions=shared)
    counts = []
    for layers in (2, 4):
        model = MemVPModel(_base(layers, dtype), config, backend=backend).train()
        counts.append(_operations(lambda m=model: _step(m, **images)))
        base = _base(layers, dtype).requires_grad_(False)
        base.get_input_embeddings().weight.requires_grad_()
        counts[-1].subtract({"aten::cat": _operations(lambda m=base: _step(m))["aten::cat"]})
    few, many = counts
    return {name: many[name] - few[name] for name in (*_PASSES, "aten::cat", "aten::clamp")}


@pytest.mark.parametrize(
    ("backend", "dtype", "shared"),
    [("torch", torch.float32, True), ("torch", torch.float32, False), ("triton", torch.float16, True)],
)
def test_no_pass_over_the_memory_once_per_layer(backend: str, dtype: torch.dtype, shared: bool) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        from tests.triton.interpreter import repair

        repair()
    found = _per_layer(dtype, backend, shared)
    if backend == "torch":  # of the tokens' products with the factors, in each of two layers: one forward, two backward
        found["aten::cat"] -= 2 * 3
    assert set(found.values()) == {0}


def _alive() -> int:
    gc.collect()
    return sum(type(found) is SharedMemory for found in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_a_forward_outlives_it(checkpointing: bool, backward: bool) -> None:
    """Not even where nobody went back through it, and activation checkpointing keeps every layer's arguments."""
    model = wrapped().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    before = _alive()
    out = model(input_ids=tokens(3), labels=tokens(3), image_features=features(4, 0, 10))
    if backward:
        out.loss.backward()
    del out
    assert _alive() == before


def test_an_exception_in_a_layer_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped().train()
    before = _alive()
    inputs: dict[str, Any] = {"input_ids": tokens(3), "labels": tokens(3), "image_features": features(4, 0, 10)}
    layer = model.language_model.model.layers[1]

    def fail(*args: Any) -> None:
        raise ArithmeticError

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        model(**inputs)
    handle.remove()
    assert _alive() == before
    model(**inputs).loss.backward()
    again = wrapped().train()
    again(**inputs).loss.backward()
    assert torch.equal(model.key_position.grad, again.key_position.grad)


def test_a_memory_that_is_moved_or_cast_on_the_way_is_formed_again() -> None:
    """Device maps send it layer by layer; a memory that comes back in its own dtype is the same one."""
    model = wrapped()
    ids, images = tokens(3), features(4, 0, 10)
    made: list[Memory] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        memory = kwargs["visual_memory"]
        made.append(memory)
        assert memory.to(torch.float32) is memory and memory.to(torch.device("cpu")) is memory
        moved = memory.to(torch.float64)
        assert moved.shared is None
        return args, {**kwargs, "visual_memory": moved}

    wanted = _gradients(model, ids, images)
    for layer in model.language_model.model.layers:
        layer.register_forward_pre_hook(record, with_kwargs=True)
    torch.testing.assert_close(_gradients(model, ids, images), wanted)
    assert len(made) == len(model.memory_ffns())


def _gradients(model: MemVPModel, ids: Tensor, images: Any) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, image_features=images).loss.backward()
    return [p.grad.clone() for p in model.memory.parameters() if p.grad is not None]
