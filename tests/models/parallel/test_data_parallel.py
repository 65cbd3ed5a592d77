"""DDP and FSDP2 over a frozen base: gradients equal one process's on the whole batch, whatever a rank's part of it lacks."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from memvp_kernels import MemVPConfig
from tests.models.parallel.processes import Group
from tests.models.parallel.tiny import (
    ADEM_VL,
    CONFIG,
    Reference,
    adapter_gradients,
    batch,
    difference,
    language_model,
    memvp_model,
    reference,
)

LAYOUTS = ("ddp", "ddp-static", "ddp-memory", "fsdp2-root", "fsdp2-own", "fsdp2-recipe")

#: Samples without an image: none, some on each rank, all of rank 1's.
TEXT_ONLY = {"images": (), "some": (1, 2), "rank 1 has none": (2, 3), "none at all": (0, 1, 2, 3)}


def laid_out(layout: str, model: Any = None, policy: Any = None, **options: Any) -> tuple[Any, nn.Module]:
    """The MemVPModel (default: `memvp_model(**options)`), and what is called in its stead; policy: FSDP2's for numbers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = memvp_model(**options) if model is None else model
    if layout.startswith("ddp") and layout != "ddp-memory":
        return model, DistributedDataParallel(model, static_graph=layout == "ddp-static")
    if layout.startswith("fsdp2"):
        parts = [*model.language_model.model.layers]
        parts += {"fsdp2-root": [model], "fsdp2-own": [model.memory, model]}.get(layout, [model.language_model])
        for module in parts:
            fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    if layout in ("ddp-memory", "fsdp2-recipe"):
        model.memory = DistributedDataParallel(model.memory)
    return model, model


def part(inputs: dict[str, Any]) -> dict[str, Any]:
    """This rank's samples."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = len(inputs["input_ids"]) // world
    return {name: values[rank * count : (rank + 1) * count] for name, values in inputs.items()}


def assert_within(answers: list[dict[str, float]]) -> None:
    """Every rank's errors, in parts of what they may be."""
    for errors in answers:
        assert max(errors.values()) < 1, errors


def full_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    """Sharded tensors gathered."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def averaged(loss: torch.Tensor) -> torch.Tensor:
    """Of the ranks' losses, which have equally many tokens."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def _errors(layout: str, inputs: dict[str, Any], wanted: Reference, checkpointing: bool) -> dict[str, float]:
    model, entry = laid_out(layout)
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = {}
    for _ in range(2):  # a second step, because a wrong first one often shows only then
        for parameter in model.memory.parameters():
            parameter.grad = None
        loss = entry(**part(inputs)).loss
        loss.backward()
        found = full_tensors(adapter_gradients(model))
    assert all(p.grad is None for p in model.language_model.parameters())
    return wanted.errors(averaged(loss), found)


@pytest.mark.parametrize(
    ("layout", "text_only", "checkpointing"),
    [
        *((layout, *how) for layout in LAYOUTS for how in (("some", True), ("rank 1 has none", False))),
        *((layout, how, False) for layout in ("ddp", "fsdp2-root") for how in ("images", "none at all")),
    ],
)
def test_gradients_are_those_of_one_process(two: Group, layout: str, text_only: str, checkpointing: bool) -> None:
    """A rank without any image neither hangs nor fails: its zero cores pass every layer like any other."""
    assert_within(two.run(_errors, layout, batch(without=TEXT_ONLY[text_only]), _reference(text_only), checkpointing))


@functools.cache
def _reference(text_only: str) -> Reference:
    return reference(batch(without=TEXT_ONLY[text_only]))


def _leftovers(layout: str) -> tuple[int, int]:
    """What is alive and as large as a layer's matrix, or larger: before the forward, and between it and the backward."""
    model, entry = laid_out(layout, base=language_model(intermediate_size=200))  # larger than anything else is
    pairs = model.language_model.config.intermediate_size * model.language_model.config.hidden_size

    def alive() -> int:
        gc.collect()
        tensors = [
            t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, nn.Parameter)
        ]
        return sum(t.untyped_storage().nbytes() >= pairs * t.element_size() for t in tensors)

    before = alive()
    loss = entry(**part(batch())).loss
    between = alive()
    loss.backward()
    return before, between


@pytest.mark.parametrize("layout", ["fsdp2-root", "fsdp2-recipe"])
def test_no_layer_stays_whole_between_forward_and_backward(two: Group, layout: str) -> None:
    """A copy of a weight (packed, transposed, concatenated) kept for the backward would undo the sharding."""
    for before, between in two.run(_leftovers, layout):
        assert before == between == 0


def _accumulated() -> dict[str, float]:
    model, entry = laid_out("ddp")
    inputs = part(batch(samples=8, without=(3,)))
    first, second = ({n: v[half : half + 2] for n, v in inputs.items()} for half in (0, 2))
    with entry.no_sync():
        loss = entry(**first).loss / 2
        loss.backward()
    rest = entry(**second).loss / 2
    rest.backward()
    return reference(batch(samples=8, without=(3,))).errors(averaged(loss + rest), adapter_gradients(model))


def test_accumulation_without_synchronising(two: Group) -> None:
    assert_within(two.run(_accumulated))


def _half_precision(layout: str, by_policy: bool) -> dict[str, float]:
    """A bfloat16 base under a float32 memory, as it is trained; under a policy, the root's inputs are cast as well, the images among them."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = torch.bfloat16
    wanted = reference(batch(), dtype=half)
    policy = MixedPrecisionPolicy(param_dtype=half) if by_policy else None
    model, _ = laid_out(layout, policy=policy, base=language_model() if by_policy else language_model().to(half))
    loss = model(**part(batch())).loss
    loss.backward()
    return wanted.errors(averaged(loss), full_tensors(adapter_gradients(model)))


@pytest.mark.parametrize("by_policy", [False, True])
@pytest.mark.parametrize("layout", ["fsdp2-recipe", "fsdp2-root"])
def test_a_half_precision_base_under_a_float32_memory(two: Group, layout: str, by_policy: bool) -> None:
    assert_within(two.run(_half_precision, layout, by_policy))


def _sharded_first(config: MemVPConfig) -> tuple[dict[str, float], bool, bool]:
    """Wrapped after sharding; then generation, which runs the layers by itself; then the language model back."""
    from torch.distributed.fsdp import fully_shard

    base = language_model()
    for module in (*base.model.layers, base):
        fully_shard(module)
    model, _ = laid_out("ddp-memory", memvp_model(base, config))
    whole_batch = batch(tokens=4 + config.class_token)  # its feature is one more
    loss = model(**part(whole_batch)).loss
    loss.backward()
    errors = reference(whole_batch, config=config).errors(averaged(loss), adapter_gradients(model))
    inputs = {name: v for name, v in whole_batch.items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = model.eval().generate(**inputs, **options)
    alone = memvp_model(config=config).eval().generate(**inputs, **options)
    with torch.no_grad():
        unloaded = model.unload()(input_ids=inputs["input_ids"]).logits
        plain = language_model()(input_ids=inputs["input_ids"]).logits
    return errors, torch.equal(tokens, alone), torch.equal(unloaded, plain)


@pytest.mark.parametrize("config", [CONFIG, ADEM_VL], ids=["MemVP", "ADEM-VL"])
def test_a_base_that_was_sharded_before(two: Group, config: MemVPConfig) -> None:
    answers = two.run(_sharded_first, config)
    assert_within([errors for errors, _, _ in answers])
    assert all(tokens and unloaded for _, tokens, unloaded in answers)


def _root_generates(layout: str) -> tuple[bool, float, dict[str, float]]:
    """What runs the model without being its forward, on a root that FSDP2 has sharded; answers of unequal length."""
    model, entry = laid_out(layout)
    inputs = {name: v for name, v in part(batch()).items() if name != "labels"}
    new = 2 + 3 * dist.get_rank()
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    alone = memvp_model().eval()
    wanted = alone.generate(**inputs, **options)
    tokens = model.eval().generate(**inputs, **options)
    features = inputs["image_features"]
    with torch.no_grad():
        core = difference(model.encode_images(features), alone.encode_images(features))
    loss = entry.train()(**part(batch())).loss  # and training goes on
    loss.backward()
    errors = reference(batch()).errors(averaged(loss), full_tensors(adapter_gradients(model)))
    return torch.equal(tokens, wanted), core, errors


@pytest.mark.parametrize("layout", ["fsdp2-root", "fsdp2-own", "fsdp2-recipe"])
def test_generation_and_encoding_by_a_sharded_model(two: Group, layout: str) -> None:
    """A rank that is done first goes on with the others, as transformers sees to: they could not gather a layer without it."""
    answers = two.run(_root_generates, layout)
    assert_within([errors for _, _, errors in answers])
    assert all(tokens and core == 0.0 for tokens, core, _ in answers)


def _with_vision(pixels: list[Any], shard: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In float64, CLIP adapters among what trains."""
    from torch.distributed.fsdp import fully_shard

    from memvp_kernels.models.patching import vision_adapters as vision
    from tests.models.clip import vision_model

    clip = vision_model(CONFIG.vision_dim)
    torch.manual_seed(8)
    for adapter in vision.attach_adapters(clip, hidden_dim=3, dropout=0.0):
        nn.init.normal_(adapter.fc2.weight)
    model: Any = memvp_model(language_model().double(), vision_model=clip.double())
    inputs = {name: v for name, v in batch().items() if name != "image_features"} | {"pixel_values": pixels}
    if shard:
        for layer in clip.encoder.layers:
            fully_shard(layer)
        laid_out("fsdp2-root", model)
    return _float64_step(model, inputs, shard)


def _float64_step(model: Any, inputs: dict[str, Any], shared: bool, entry: Any = None) -> Any:
    """Loss and gradients; of a batch that ranks share, averaged and whole."""
    loss = (entry or model)(**(part(inputs) if shared else inputs)).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return (averaged(loss), full_tensors(found)) if shared else (loss.detach(), found)


def _assert_float64(answers: list[Any], wanted: Any) -> None:
    for found in answers:
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("missing", [(), (2, 3), (0, 1, 2, 3)], ids=["images", "rank 1 has none", "none at all"])
def test_a_sharded_vision_model(two: Group, missing: tuple[int, ...]) -> None:
    """A rank without an image gathers the vision model's blocks like the others, for a blank one that counts for nothing."""
    from tests.models.clip import pixels

    images = [None if i in missing else image for i, image in enumerate(pixels(4).double())]
    wanted = _with_vision(images, False)
    assert any("adapter_mlp" in name for name in wanted[1])
    _assert_float64(two.run(_with_vision, images, True), wanted)


def _of_family(family: str, layout: str | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In float64; rank 1's samples have no image."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from memvp_kernels.models.patching.families import find_layers
    from tests.models import tiny

    model: Any = tiny.with_memory(tiny.language_model(family).double())
    inputs = {"input_ids": tiny.tokens(4), "labels": tiny.tokens(4, 3), "image_features": tiny.features(4, 7, 0, 0)}
    if layout == "fsdp2":
        for module in (*(layer for _, layer, _ in find_layers(model.language_model)), model):
            fully_shard(module)
    entry = DistributedDataParallel(model) if layout == "ddp" else model
    return _float64_step(model, inputs, layout is not None, entry)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(two: Group, family: str, layout: str) -> None:
    _assert_float64(two.run(_of_family, family, layout), _of_family(family, None))


def _cores() -> float:
    """A core made by one call serves another, in a layout whose parameters are whole only while their module runs."""
    model, _ = laid_out("fsdp2-own")
    inputs = batch()
    features = inputs.pop("image_features")
    with torch.no_grad():
        model(**inputs)  # FSDP2 wants its root called before anything inside it, and says so
        core = model.encode_images(features)
        return difference(model(**inputs, visual_core=core).logits, model(**inputs, image_features=features).logits)


def test_cores_from_a_sharded_memory(two: Group) -> None:
    assert two.run(_cores) == [0.0, 0.0]


def _names() -> tuple[list[str], bool]:
    """What policies and device maps go by."""
    from accelerate import infer_auto_device_map
    from accelerate.utils.dataclasses import get_module_class_from_name
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    model = memvp_model()
    kind: Any = get_module_class_from_name(model, "LlamaDecoderLayer")
    wrapped = [
        name
        for name, module in model.named_modules()
        if transformer_auto_wrap_policy(module, False, 0, transformer_layer_cls={kind})
    ]
    base = model.language_model
    layer = sum(p.nbytes for p in base.model.layers[0].parameters())
    sizes = {0: int(1.5 * layer), 1: int(1.5 * layer), "cpu": 10**9}
    devices = infer_auto_device_map(base, max_memory=sizes, no_split_module_classes=list(base._no_split_modules))
    inside = [name for name in devices if ".mlp" in name or ".self_attn" in name]
    return wrapped, not inside


def test_policies_and_device_maps_find_the_layers_by_name() -> None:
    wrapped, kept_whole = _names()
    assert wrapped == ["language_model.model.layers.0", "language_model.model.layers.1"]
    assert kept_whole


def test_generation_under_checkpointing_is_refused_in_training_mode() -> None:
    """transformers withholds the cache there while generate() goes on token by token: the tokens come out wrong."""
    model = memvp_model().eval()
    inputs = {name: v for name, v in batch().items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**inputs, **options)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs, **options), wanted)
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        model.train().generate(**inputs, **options)
    model.gradient_checkpointing_disable()
    assert torch.equal(model.generate(**inputs, **options), wanted)
