"""torch.compile and torch.export: whole graphs, one for every batch, for every way to pass an image."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from memvp_kernels import MemVPModel
from tests.models.clip import pixels, vision_model
from tests.models.tiny import CONFIG, IMAGES, VISION, features, inputs, one_layer, tokens, with_memory, wrapped
from tests.models.tools import fails_before

WAYS = ("features", "list", "pixels", "core", "index", "text")


def _step(model: Any, images: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(image_features=images, **inputs()).loss
    loss.backward()
    gradients = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def model() -> MemVPModel:
    """One layer and a vision model."""
    memvp = with_memory(one_layer(), vision_model=vision_model(num_hidden_layers=2))
    memvp.config.use_cache = False  # torch.export knows no cache
    return memvp


_T5 = fails_before(torch_="2.13")  # whose tracer can't copy the configuration for its cache


@pytest.mark.parametrize("family", ["llama", pytest.param("t5-gated", marks=_T5), "bart"])
def test_a_step_compiles_whole(family: str) -> None:
    """With one image shorter and one missing; dropout draws what it draws uncompiled."""
    model = wrapped(family, dataclasses.replace(CONFIG, dropout=0.5))
    model.memory.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for images in [IMAGES, torch.stack(features(4, 4, 4))][: 2 if family == "llama" else 1]:
        torch.manual_seed(3)
        got = _step(compiled, images)
        torch.manual_seed(3)
        torch.testing.assert_close(got, _step(model, images))


@pytest.mark.slow  # the operator's own test is in every run
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler that inductor calls is not installed")
def test_a_step_compiles_with_inductor() -> None:
    """The default backend, once, forward and backward."""
    model = with_memory(one_layer())
    torch.testing.assert_close(_step(torch.compile(model, fullgraph=True), IMAGES), _step(model, IMAGES))


@_T5
def test_an_opaque_ffn_compiles_in_training() -> None:
    model = wrapped("t5").train()
    loss, _ = _step(torch.compile(model, fullgraph=True, backend="aot_eager"), IMAGES)
    assert model.key_position.grad is not None and loss.isfinite()


def test_the_language_model_compiles_as_generate_does_it() -> None:
    """With a static cache on a GPU, generate() compiles the language model, which then gets the memory from outside."""
    model = with_memory(one_layer())
    index = torch.tensor([0, 2, 1])
    with torch.no_grad():
        wanted = model(image_features=IMAGES, visual_index=index, **inputs()).logits
        memory = model.memory(core=model.encode_images(IMAGES))
        compiled = torch.compile(model.language_model, fullgraph=True, backend="aot_eager")
        got = compiled(**inputs(), visual_memory=memory, memory_index=index).logits
    torch.testing.assert_close(got, wanted)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.broadcast_buffers. is deprecated")
@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "DDP"])
def test_one_graph_whichever_images_are_missing(model: MemVPModel, how: str, request: pytest.FixtureRequest) -> None:
    """The vision model specialises to a single image, and does not run for none."""
    counter = CompileCounter()
    compiled: Any = model
    if how == "torch.compile":
        compiled = torch.compile(model, fullgraph=True, backend=counter)
    elif how == "model.compile":
        model.compile(fullgraph=True, backend=counter)
    else:
        request.getfixturevalue("one_process")
        compiled = torch.compile(DistributedDataParallel(model, broadcast_buffers=False), backend=counter)
    features_of_all, pixels_of_all = features(4, 7, 10), pixels(3)
    with torch.no_grad():
        for name, images, graphs in (("image_features", features_of_all, 1), ("pixel_values", pixels_of_all, 2)):
            if name == "pixel_values" and how != "torch.compile":
                continue
            counter.frame_count = 0
            for shown in list(itertools.product([True, False], repeat=3))[:-1]:
                batch = {name: [image if there else None for image, there in zip(images, shown, strict=True)]}
                got = compiled(**batch, **inputs()).logits
                torch.testing.assert_close(got, model.forward(**batch, **inputs()).logits)
            assert counter.frame_count == graphs, name


def test_lists_compile_inside_a_larger_function() -> None:
    model = with_memory(one_layer())

    @torch.compile(fullgraph=True, backend="eager")
    def logits(ids: Tensor, images: Any) -> Tensor:
        return model(input_ids=ids, image_features=images).logits

    with torch.no_grad():
        torch.testing.assert_close(logits(tokens(3), IMAGES), model(input_ids=tokens(3), image_features=IMAGES).logits)


def _batch(model: MemVPModel, way: str, samples: int, length: int, visual: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(samples)
    images = torch.randn(samples, visual, VISION, generator=generator)
    ways: dict[str, dict[str, Any]] = {
        "features": {"image_features": images},
        "list": {"image_features": [image if i % 2 else None for i, image in enumerate(images)]},
        "pixels": {"pixel_values": pixels(samples)},
        "core": {"visual_core": model.encode_images(images).detach()},
        "index": {"image_features": images[:2], "visual_index": torch.arange(samples) % 3 - 1},
        "text": {},
    }
    return {"input_ids": tokens(samples, length), **ways[way]}


@pytest.mark.parametrize("way", WAYS)
def test_one_graph_for_every_size(model: MemVPModel, way: str) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=(counter := CompileCounter()))
    with torch.no_grad():
        for sizes in ((4, 5, 3), (2, 7, 4), (6, 9, 2)):
            batch = _batch(model, way, *sizes)
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("way", "strict"),
    [(way, False) for way in WAYS]
    + [pytest.param(way, True, marks=[] if way == "index" else pytest.mark.slow) for way in WAYS],
)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export(model: MemVPModel, way: str, strict: bool) -> None:
    """Any batch, text and image length; a list keeps the samples that it had."""

    def dynamic(value: Any) -> Any:
        if isinstance(value, list):
            return [dynamic(entry) for entry in value]
        return None if value is None else dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)

    with torch.no_grad():
        batch = _batch(model, way, 4, 5, 3)
        shapes = {name: dynamic(value) for name, value in batch.items()}
        program = torch.export.export(model, (), batch, dynamic_shapes=shapes, strict=strict).module()
        for samples in [4] if way == "list" else [2, 6]:
            batch = _batch(model, way, samples, 7, 4)
            torch.testing.assert_close(program(**batch).logits, model(**batch).logits)


@fails_before(transformers="5.23")
def test_transformers_exporter() -> None:
    """Prefill and decode of the language model, the memory among their inputs, for any batch."""
    dynamo = pytest.importorskip("transformers.exporters.exporter_dynamo")
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.utils import decompose_for_generation

    model = with_memory(one_layer())

    def generation(samples: int) -> dict[str, Any]:
        memory = model.memory(core=model.encode_images(features(*[4] * samples)))
        return {"input_ids": tokens(samples, 6), "visual_memory": memory}

    with torch.no_grad():
        exporter = dynamo.DynamoExporter()
        exported = exporter.export_for_generation(model.language_model, generation(2), DynamoConfig(dynamic=True))
        _, prefill = decompose_for_generation(model.language_model, generation(3))["prefill"]
        prefill = {name: value for name, value in prefill.items() if name not in ("use_cache", "return_dict")}
        got = exported.components["prefill"].program.module()(**prefill).logits
        wanted = model(input_ids=tokens(3, 6), image_features=features(4, 4, 4)).logits
    torch.testing.assert_close(got[:, -1], wanted[:, -1])
