"""vLLM with a memory says token for token what MemVPModel.generate says, whatever the scheduler does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from memvp_kernels import MemVPModel
from memvp_kernels.serving.vllm import save_for_vllm
from tests.serving import tiny
from tests.serving.vllm.engine import Report, Request, answers

RUNNERS = ("v1", "v2")
FUSED = {"memvp_ffn": "fused"}
SHORT, LONG = list(range(40, 60)), [(i * 37) % 400 + 10 for i in range(150)]


def assert_equal(model: MemVPModel, rounds: list[list[Request]], report: Report) -> None:
    known: dict[tuple[object, ...], list[int]] = {}
    for number, (requests, found) in enumerate(zip(rounds, report.rounds, strict=True)):
        for i, (request, answer) in enumerate(zip(requests, found, strict=True)):
            key = (tuple(request.prompt), id(request.image))
            if key not in known:
                image = {} if request.image is None else _image(request)
                known[key] = tiny.answer(model, request.prompt, len(answer.tokens), **image)
            assert answer.tokens == known[key], f"round {number}, request {i}"


def _image(request: Request) -> dict[str, object]:
    if isinstance(request.image, dict):
        return {name: tensor[None] for name, tensor in request.image.items()}
    assert request.image is not None
    return {"image_features": request.image[None]}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str, runner: str, tmp_path: Path) -> None:
    """Mixed batches; prefix-cache hits with the same image, another one and none; prompts longer than a step."""
    options = {} if family == "Llama" else {"layers": (0, 2), "shared_positions": False, "memory_scale": (1.0, 0.6)}
    model = tiny.model(family, **options)
    save_for_vllm(model, tmp_path)
    one, two, few = tiny.images(3)
    core = {"visual_core": model.encode_images(image_features=[two])[0].detach()}
    rounds = [
        [Request(SHORT, one), Request(SHORT), Request(SHORT, two), Request(SHORT, few), Request(SHORT, core)],
        [Request(LONG, one), Request(LONG[:70], two), Request(SHORT)],
        [Request(LONG, one), Request(LONG[:70], two), Request(SHORT)],
        [Request(LONG, two), Request(LONG), Request(LONG, one), Request(LONG, few)],
    ]
    report = answers(tmp_path, rounds, tokens=16, runner=runner, max_num_batched_tokens=64)
    assert_equal(model, rounds, report)
    assert len({tuple(a.tokens) for a in report.rounds[0][:4]}) == 4, "the images change the answers"
    assert report.rounds[2][0].cached > 0 and report.rounds[3][0].cached == 0 and report.rounds[3][2].cached > 0


@pytest.mark.parametrize("runner", RUNNERS)
def test_two_hundred_requests(runner: str, tmp_path: Path) -> None:
    """In random order over a KV cache that holds few of them, and an encoder cache of two images: preemption, eviction, images that come back."""
    model = tiny.model()
    save_for_vllm(model, tmp_path)
    images, order = [None, *tiny.images(12)], random.Random(0)
    requests = []
    while len(requests) < 200:
        start = order.randrange(3) * 30
        requests.append(Request(LONG[start : start + order.choice((7, 25, 60))], order.choice(images)))
        requests += requests[-1:] * order.randrange(2)  # asked again at once, so that some prefix is still cached
    rounds = [requests[:100], requests[100:]]
    report = answers(
        tmp_path,
        rounds,
        tokens=8,
        runner=runner,
        num_gpu_blocks_override=8,
        block_size=32,
        max_num_batched_tokens=32,
        max_model_len=100,
        image_cache=2,
        mm_processor_cache_gb=0,
    )
    assert_equal(model, rounds, report)
    assert report.counters["vllm:num_preemptions"] > 0 and any(a.cached for a in report.rounds[1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fused_ffn(family: str, tmp_path: Path) -> None:
    """The whole FFN in the operator, over vLLM's own weights; its linear layers are left without a product, so they can't have run."""
    # Where the memory does not drown the FFN, an answer depends on both.
    model = tiny.model(family, sizes={"mlp_bias": True} if family == "Llama" else {}, memory_scale=0.03)
    for name, parameter in model.language_model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_for_vllm(model, tmp_path)
    one, two = tiny.images(2)
    rounds = [
        [Request(SHORT, one), Request(SHORT), Request(LONG, two)],
        [Request(LONG, two), Request(LONG, one), Request(SHORT)],
    ]
    report = answers(tmp_path, rounds, tokens=16, max_num_batched_tokens=64, additional_config=FUSED)
    assert_equal(model, rounds, report)
    assert report.rounds[1][0].cached > 0 and report.rounds[1][1].cached == 0
    assert len({tuple(a.tokens) for a in (*report.rounds[0], report.rounds[1][1])}) == 4, (
        "the images change the answers"
    )


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("options", [{}, {"additional_config": FUSED}], ids=["vllm", "fused"])
def test_compiled(options: dict[str, Any], runner: str, tmp_path: Path) -> None:
    model = tiny.model("Qwen3")
    save_for_vllm(model, tmp_path)
    rounds = [[Request(SHORT, image) for image in (None, *tiny.images(3))]] * 2
    report = answers(tmp_path, rounds, tokens=8, runner=runner, enforce_eager=False, **options)
    assert_equal(model, rounds, report)


def test_two_ranks(tmp_path: Path) -> None:
    """Tensor parallelism: every rank adds the whole memory to the whole output."""
    model = tiny.model()
    save_for_vllm(model, tmp_path)
    one, two = tiny.images(2)
    rounds = [[Request(SHORT, one), Request(SHORT), Request(LONG, two)], [Request(LONG, two), Request(LONG, one)]]
    report = answers(
        tmp_path,
        rounds,
        tokens=8,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=64,
        variables={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert_equal(model, rounds, report)
    assert report.rounds[1][0].cached > 0


def test_speculation(tmp_path: Path) -> None:
    """Drafts by n-grams of what was said: a request then has several tokens in a step of decoding.

    With runner V1: the other one drafts by kernels that Triton's interpreter does not run.
    """
    model = tiny.model()
    save_for_vllm(model, tmp_path)
    one, two = tiny.images(2)
    rounds = [[Request(SHORT, one), Request(SHORT), Request(SHORT, two)], [Request(SHORT, two), Request(LONG, one)]]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    report = answers(tmp_path, rounds, tokens=48, speculative_config=drafts)
    assert_equal(model, rounds, report)
    accepted = report.counters["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < report.counters["vllm:spec_decode_num_draft_tokens"]
