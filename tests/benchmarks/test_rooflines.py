"""Counts against brute force: PyTorch's own FLOP counter over the eager forms, and the bytes of the tensors themselves."""

from __future__ import annotations

import pytest
import torch
from harness import core_case
from harness.cli import common_parser, settle
from harness.operands import Adapter, Parts, Weights
from harness.presets import PRESETS
from harness.rooflines import (
    FORMS,
    Count,
    FFNShape,
    Roofs,
    attention,
    ffn_backward,
    ffn_forward,
    head,
    kernel,
    layer,
    training_step,
)
from harness.variants import variants
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
PRESET = PRESETS["smallest"]
S, T, IMAGE = 3, 5, 7
SHAPE = FFNShape.of(PRESET, sequences=S, tokens=T, visual_tokens=IMAGE, element=4)
EAGER = {
    "text": "text",
    "prompt": "prompt",
    "official": "official-eager",
    "formed": "formed-eager",
    "factored": "factored-eager",
    "concatenated": "concatenated",
}


def run(form: str) -> tuple[Tensor, Tensor, Parts, Weights, object]:
    """(y, x, parts, weights, bound) of the eager form, x and memory being leaves."""
    variant = variants(CPU, compiled=False)[EAGER[form]]
    weights = Weights.random(PRESET, device=CPU, dtype=torch.float32, seed=0)
    adapter = Adapter(PRESET, slots=SHAPE.slots, device=CPU)
    parts = adapter.parts(adapter.batch(S, IMAGE), dtype=torch.float32).map(lambda t: t.detach().requires_grad_())
    shared = variant.share(parts)
    leaves = [t.detach().requires_grad_() for t in vars(shared).values() if isinstance(t, Tensor)] if shared else []
    if shared:
        scale = [v for v in vars(shared).values() if not isinstance(v, Tensor)]
        shared = type(shared)(*leaves, *scale)
    bound = variant.bind(weights, shared) if variant.has_memory else None
    x = torch.randn(S, SHAPE.rows(form) // S, PRESET.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = variant.step(x, weights, bound, 0.0)
    run.flops = counter.get_total_flops()  # type: ignore[attr-defined]
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), [x, *leaves])
    run.backward_flops = counter.get_total_flops()  # type: ignore[attr-defined]
    return y, x, parts, weights, bound


@pytest.mark.parametrize("form", sorted(EAGER))
def test_forward_flops_are_what_pytorch_counts(form: str) -> None:
    run(form)
    assert ffn_forward(form, SHAPE).flops == run.flops  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["text", "prompt", "formed", "official"])
def test_backward_flops_are_what_pytorch_counts(form: str) -> None:
    run(form)
    assert ffn_backward(form, SHAPE).flops == run.backward_flops  # type: ignore[attr-defined]


def test_factored_backward_counts_what_is_formed_again() -> None:
    """Autograd keeps x Wᵀ and visual·A, which this package forms again: 2 N d r and 2 N M r more."""
    run("factored")
    n, d, m, r = S * T, PRESET.width, SHAPE.slots, PRESET.rank
    again = 2 * n * d * r + 2 * n * m * r
    assert ffn_backward("factored", SHAPE).flops == run.backward_flops + again  # type: ignore[attr-defined]


@pytest.mark.parametrize("form", ["text", "prompt", "formed", "factored"])
def test_forward_bytes_are_those_of_the_tensors(form: str) -> None:
    y, x, parts, weights, bound = run(form)
    read = [*weights.tensors, x]
    if form == "formed":
        read += [bound.key, bound.value]  # type: ignore[attr-defined]
    if form == "factored":
        read += list(parts.tensors)
    assert ffn_forward(form, SHAPE).bytes == sum(t.nbytes for t in [*read, y])


def test_concatenated_bytes_are_those_of_its_copies() -> None:
    y, x, _, weights, bound = run("concatenated")
    read = [x, weights.gate, bound.key, bound.value]  # type: ignore[attr-defined]
    assert ffn_forward("concatenated", SHAPE).bytes == sum(t.nbytes for t in [*read, y])


def test_training_writes_what_the_backward_needs() -> None:
    for form, kept in (("text", 2 * PRESET.pairs), ("formed", 2 * PRESET.pairs + SHAPE.slots)):
        more = ffn_forward(form, SHAPE, training=True).bytes - ffn_forward(form, SHAPE).bytes
        assert more == S * T * kept * 4


def test_an_ungated_ffn_has_two_matrices() -> None:
    plain = FFNShape(**{**vars(SHAPE), "gated": False})
    assert ffn_forward("text", plain).flops * 3 == ffn_forward("text", SHAPE).flops * 2


def test_attention_counts_each_visible_pair() -> None:
    queries, cached = 4, 6
    visible = sum(1 for _ in range(S) for q in range(queries) for k in range(cached + queries) if k <= cached + q)
    d, kv, n = PRESET.width, PRESET.kv_width, S * queries
    projections = [(d, d), (d, kv), (d, kv), (d, d)]
    flops = sum(2 * n * rows * columns for rows, columns in projections) + 2 * 2 * visible * d
    weights = sum(rows * columns for rows, columns in projections)
    cache = 2 * S * kv * (cached + queries)
    counted = attention(PRESET, sequences=S, queries=queries, cached=cached, element=2)
    assert counted == Count(flops, 2 * (weights + cache + 2 * n * d))


def test_a_layer_is_its_ffn_and_its_attention() -> None:
    prompt = layer("prompt", PRESET, SHAPE)
    assert prompt == ffn_forward("prompt", SHAPE) + attention(
        PRESET, sequences=S, queries=IMAGE + T, cached=0, element=4
    )
    one = FFNShape.of(PRESET, sequences=S, tokens=1, visual_tokens=IMAGE, element=4)
    decode = layer("prompt", PRESET, one, cached=IMAGE + T)
    assert decode == ffn_forward("text", one) + attention(PRESET, sequences=S, queries=1, cached=IMAGE + T, element=4)


def test_checkpointing_runs_every_layer_once_more() -> None:
    once = training_step("formed", PRESET, SHAPE, layers=3)
    twice = training_step("formed", PRESET, SHAPE, layers=3, checkpointing=True)
    forward = ffn_forward("formed", SHAPE).flops + attention(PRESET, sequences=S, queries=T, cached=0, element=4).flops
    assert twice.flops - once.flops == 3 * forward


def test_the_head_is_one_product() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.randn(5, PRESET.width) @ torch.randn(PRESET.width, PRESET.vocabulary)
    assert head(PRESET, rows=5, element=4).flops == counter.get_total_flops()


def test_the_five_kernels_together_are_the_training_ffn() -> None:
    forward = kernel("hidden", SHAPE).flops + kernel("output", SHAPE).flops
    assert forward == ffn_forward("formed", SHAPE).flops
    backward = sum(kernel(name, SHAPE).flops for name in ("dhidden", "dinput", "dmemory"))
    assert backward == ffn_backward("formed", SHAPE).flops
    assert (
        kernel("hidden", SHAPE).bytes + kernel("output", SHAPE).bytes
        > ffn_forward("formed", SHAPE, training=True).bytes
    )


def test_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    roofs = Roofs(matmul_tflops=100, copy_gbs=1000, stream_gbs=2000)
    assert roofs.floor_ms(Count(flops=10**14, bytes=10**9)) == pytest.approx(1000)
    assert roofs.floor_ms(Count(flops=10**9, bytes=2 * 10**12)) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("form", "sequences", "tokens", "microseconds"),
    [
        ("text", 1, 1, 62.9), ("formed", 1, 1, 64.1), ("positions", 1, 1, 64.7), ("factored", 1, 1, 64.4),
        ("formed", 16, 1, 82.4), ("positions", 16, 1, 73.9), ("factored", 16, 1, 64.7),
        ("formed", 64, 1, 140.9), ("positions", 64, 1, 103.2), ("factored", 64, 1, 65.7),
        ("text", 16, 512, 2805), ("formed", 16, 512, 2860),
    ],
)  # fmt: skip
def test_llama_7b_on_an_h200_as_worked_out_on_paper(
    form: str, sequences: int, tokens: int, microseconds: float
) -> None:
    """At 790 TFLOP/s and 4.3 TB/s; the paper sums leave out x and y, at most 0.3 µs."""
    shape = FFNShape.of(PRESETS["llama-7b"], sequences=sequences, tokens=tokens, visual_tokens=256, element=2)
    floor = Roofs(790, 4300, 4300).floor_ms(ffn_forward(form, shape)) * 1e3
    assert floor == pytest.approx(microseconds, rel=0.004)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="form: wanted one of"):
        ffn_forward("folded", SHAPE)
    assert len(FORMS) == len(set(FORMS))


@pytest.mark.parametrize("name", core_case.KERNELS)
def test_the_core_kernels_count_their_products_and_tensors(name: str) -> None:
    setting = settle(common_parser("", program="kernels").parse_args(["--device", "cpu", "--quick"]), cpu={}, cuda={})
    operands = core_case._Operands(setting, SHAPE)
    with FlopCounterMode(display=False) as counter:
        operands.products(name)()
    moved = [operands.core, *operands.reference(name, torch.float32).values()]
    moved += [operands.c] if name == "core" else [operands.e, operands.scores]
    assert kernel(name, SHAPE) == Count(counter.get_total_flops(), sum(t.nbytes for t in moved))
