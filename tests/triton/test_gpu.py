"""What only a GPU shows of the Triton kernels: the cost model's own tiles at a LLaMA's size, graphs, streams, and that nothing waits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn
from tests import cases, tolerance
from tests.cases import DEVICE
from tests.gpu import captured
from tests.tolerance import assert_same

pytestmark = pytest.mark.gpu
run = functools.partial(fused_ffn, backend="triton")
FORMS = ("plain", "factored")
TRAINED = ("x", "visual_key", "visual_value", "visual_basis", "key_position", "value_position")


def example(form: str, *, S: int = 6, T: int = 40, R: int = 4, **options: Any) -> dict[str, Any]:
    """An index with absent rows, ragged lengths and positions, in bfloat16."""
    a = cases.memory(
        cases.ffn(torch.bfloat16, S=S, T=T, d=136, F=264, **options), R=R, M=35, r=24 if form == "factored" else None
    )
    a["visual_index"] = torch.tensor([2, -1, 0, 2, 3, 1][:S], dtype=torch.int32)
    a["visual_lengths"] = torch.tensor([35, 0, 17, 1][:R], dtype=torch.int32)
    return cases.moved(a)


def step(a: dict[str, Any], grad: Tensor, **options: Any) -> list[Tensor]:
    """One training step: y and the gradients of what MemVP trains."""
    names = [n for n in TRAINED if a.get(n) is not None]
    leaves = {n: a[n].detach().requires_grad_() for n in names}
    y = run(**{**a, **leaves}, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("sequences", "length"), [(1, 64), (4, 128), (8, 512)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_the_size_of_a_llama(form: str, sequences: int, length: int, gated: bool) -> None:
    """The tiles that the cost model takes at d = 4096, F = 11008; the other tests are too small for them."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw, device=DEVICE) / shape[-1] ** 0.5).bfloat16()

    d, F, M, r = 4096, 11008, 320, 136
    width = r if form == "factored" else d
    a: dict[str, Any] = {"x": matrix(sequences, length, d) * d**0.5, "key": matrix(F, d), "value": matrix(d, F).T}
    a.update(visual_key=matrix(sequences, M, width), visual_value=matrix(sequences, M, width))
    a.update(key_position=matrix(M, d), value_position=matrix(M, d))
    if gated:
        a["gate"] = matrix(F, d)
    if form == "factored":
        a["visual_basis"] = matrix(r, d)
    tolerance.check(run, a, names=[n for n in TRAINED if n in a])


@pytest.mark.parametrize("form", FORMS)
def test_sequences_that_end_inside_the_largest_tiles(form: str) -> None:
    lengths = [511, 1, 0, 700, 77, 300]
    a = cases.memory(
        cases.ffn(torch.bfloat16, d=1024, F=2816), R=len(lengths), M=320, r=136 if form == "factored" else None
    )
    tolerance.check(run, cases.moved(cases.packed(a, lengths)), names=[n for n in TRAINED if n in a])


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_in_a_cuda_graph(form: str) -> None:
    a = example(form)
    grad = torch.randn_like(a["x"])
    graph, found = captured(lambda: step(a, grad))
    for factor in (1.0, 2.0, -0.5):
        a["x"].copy_(torch.randn_like(a["x"]) * factor)
        a["visual_index"].copy_(a["visual_index"].roll(1))
        graph.replay()
        assert_same(found, step(a, grad))


@pytest.mark.parametrize("form", FORMS)
def test_on_two_streams_at_once(form: str) -> None:
    problems = [example(form, T=length) for length in (40, 200)]
    grads = [torch.randn_like(a["x"]) for a in problems]
    alone = [step(a, grad) for a, grad in zip(problems, grads, strict=True)]
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    results: list[list[list[Tensor]]] = [[], []]
    for _ in range(10):
        for stream, a, grad, found in zip(streams, problems, grads, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(a, grad))
    torch.cuda.synchronize()
    for found, expected in zip(results, alone, strict=True):
        for once in found:
            assert_same(once, expected)


def test_follows_what_the_stream_holds_before_it() -> None:
    a = example("factored")
    grad = torch.randn_like(a["x"])
    expected = step(dict(a, x=a["x"] + 1), grad)
    for _ in range(10):
        torch.cuda._sleep(1_000_000)
        assert_same(step(dict(a, x=a["x"] + 1), grad), expected)


def test_same_bits_every_time() -> None:
    for form in FORMS:
        a = example(form, T=300)
        grad = torch.randn_like(a["x"])
        first = step(a, grad)
        for _ in range(10):
            assert_same(step(a, grad), first)


def test_on_a_device_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a = example("plain")
    grad = torch.randn_like(a["x"])
    elsewhere = cases.moved(a, torch.device("cuda:1"))
    found = [t.to("cuda:0") for t in step(elsewhere, grad.to("cuda:1"))]
    assert_same(found, step(a, grad))
    assert torch.cuda.current_device() == 0
