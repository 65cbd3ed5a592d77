"""Several threads on one model: each gets what it gets alone, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels import MemVPModel
from tests.models.tiny import ENCODER_DECODERS, KINDS, VOCABULARY, features, tokens, wrapped
from tests.models.tools import train_without_dropout

ATTENTION = ("self_attn", "SelfAttention")
NEW = 3


@contextmanager
def meeting_in_every_layer(model: nn.Module, threads: int) -> Iterator[None]:
    """Between the moment a layer binds its memory and its FFN, every thread waits for the others."""
    barrier = threading.Barrier(threads, timeout=30)
    hooks = [
        module.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ATTENTION
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def together(model: nn.Module, calls: list[Callable[[], Any]]) -> list[Any]:
    """Every call's result, each in a thread of its own."""
    with meeting_in_every_layer(model, len(calls)), ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def each_like_alone(model: nn.Module, calls: list[Callable[[], Any]], *, differ: bool = True) -> None:
    alone = [call() for call in calls]
    torch.testing.assert_close(together(model, calls), alone, rtol=0, atol=0)
    if differ:
        assert not any(torch.equal(a, b) for a, b in zip(alone, alone[1:], strict=False)), "the image matters"


def _inputs(family: str) -> dict[str, Any]:
    ids = tokens(2)
    return {"input_ids": ids, "labels": ids} if family in ENCODER_DECODERS else {"input_ids": ids}


def _forwards(model: MemVPModel, family: str) -> list[Callable[[], Tensor]]:
    """Two images, an image through an index, no image, and the bare language model."""
    inputs = _inputs(family)
    index = torch.tensor([1, -1])
    return [
        lambda: model(**inputs, image_features=features(4, 7, seed=11)).logits,
        lambda: model(**inputs, image_features=features(10, 4, seed=12)).logits,
        lambda: model(**inputs, image_features=features(4, 4, seed=13), visual_index=index).logits,
        lambda: model(**inputs).logits,
        lambda: model.language_model(**inputs).logits,
    ]


@pytest.mark.parametrize("family", KINDS)
def test_forward(family: str) -> None:
    model = wrapped(family)
    with torch.no_grad():
        each_like_alone(model, _forwards(model, family))


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bart"])
def test_opaque_ffns(family: str) -> None:
    """BART's three names each look at what is bound."""
    model = wrapped(family)
    for _, ffn in model.memory_ffns():
        for module in ffn._modules.values():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        each_like_alone(model, _forwards(model, family))


@pytest.mark.parametrize("family", KINDS)
def test_generate(family: str) -> None:
    model = wrapped(family)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # so that the text depends on the image
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    ids = tokens(1)

    def generate(seed: int | None) -> Tensor:
        images = None if seed is None else features(6, seed=seed)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), image_features=images, **options)
        return torch.stack(out.scores)

    each_like_alone(model, [lambda: generate(11), lambda: generate(12), lambda: generate(None)])


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_beside_generating(family: str, checkpointing: bool) -> None:
    """Two threads train, one without an image generates; backward runs, and recomputes, in yet another thread."""
    model = wrapped(family)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = tokens(2)
    if checkpointing:
        train_without_dropout(model).activation_checkpointing_enable()

    def step(seed: int) -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids, image_features=features(4, 7, seed=seed)).loss
        with ThreadPoolExecutor(1) as other:
            return list(other.submit(torch.autograd.grad, loss, trained).result())

    def read() -> Tensor:
        with torch.no_grad():
            return model.language_model(input_ids=ids, labels=ids).logits

    alone = [step(11), step(12), read()]
    stop = threading.Event()
    beside: list[bool] = []

    def keep_reading() -> None:
        while not stop.is_set():
            beside.append(torch.equal(read(), alone[2]))

    reader = threading.Thread(target=keep_reading)
    reader.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            found = [future.result() for future in [pool.submit(step, seed) for seed in (11, 12) * 3]]
    finally:
        stop.set()
        reader.join()
    torch.testing.assert_close(found, [alone[0], alone[1]] * 3, rtol=0, atol=0)
    assert beside and all(beside)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_explaining(family: str) -> None:
    """Each sees its own forward, and nobody else's."""
    model = wrapped(family)
    ids = tokens(1)
    more = {"labels": ids} if family in ENCODER_DECODERS else {}
    each_like_alone(
        model,
        [
            lambda: model.explain_memory(ids, image_features=features(4, seed=11), **more).slots(),
            lambda: model.explain_memory(ids, image_features=features(9, seed=12), **more).slots(),
            lambda: model(input_ids=ids, image_features=features(3, seed=13), **more).logits.detach(),
        ],
        differ=False,
    )


def test_observing_is_a_matter_of_one_thread_and_one_model() -> None:
    model, other = wrapped(), wrapped()
    seen: list[int] = []
    ids = tokens(1)
    with model.observing(lambda layer, x, y: seen.append(layer)), ThreadPoolExecutor(1) as pool:
        pool.submit(model, input_ids=ids).result()
        other(input_ids=ids)
        assert not seen
        model(input_ids=ids)
    assert seen == [0, 1]


def test_two_threads_compile_and_run() -> None:
    """A compiled model's memory is the calling thread's, too."""
    torch._dynamo.reset()
    model = wrapped()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, images = tokens(1), [features(4, seed=seed) for seed in (11, 12)]
    with torch.no_grad():
        stacked = [torch.stack(image) for image in images]
        alone = [model(input_ids=ids, image_features=image).logits for image in stacked]
        compiled(input_ids=ids, image_features=stacked[0])
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(compiled, input_ids=ids, image_features=image) for image in stacked * 3]
            found = [call.result().logits for call in calls]
    torch.testing.assert_close(found, alone * 3)
    assert found[0].shape[-1] == VOCABULARY
