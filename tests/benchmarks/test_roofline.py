"""Counts against brute force: PyTorch's own FLOP counter over the eager forms, and the bytes of the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Operands
from options import parser, settle
from roofline import Count, FFNShape, Peaks, attention, ffn_backward, ffn_forward, kernel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from variants import variants
from workload import PRESETS, Adapter, Factors, Weights

CPU = torch.device("cpu")
PRESET = PRESETS["smallest"]
S, T, IMAGE = 3, 5, 7
SHAPE = FFNShape.of(PRESET, sequences=S, tokens=T, visual_tokens=IMAGE, element=4)
EAGER = {
    "text": "text",
    "prompt": "prompt",
    "official": "official-eager",
    "plain": "plain-eager",
    "factored": "factored-eager",
}
EAGER["concatenated"] = "concatenated"


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Eager:
    """A form in plain PyTorch, x and memory being leaves, with its FLOPs."""

    def __init__(self, form: str) -> None:
        variant = variants(CPU, compiled=False)[EAGER[form]]
        self.weights = Weights.random(PRESET, device=CPU, dtype=torch.float32, seed=0)
        adapter = Adapter(PRESET, slots=SHAPE.slots, device=CPU)
        self.factors: Factors = adapter.factors(adapter.batch(S, IMAGE), dtype=torch.float32).map(Tensor.detach)
        shared = variant.share(self.factors)
        leaves = (
            [t.requires_grad_() for t in vars(shared).values() if isinstance(t, Tensor)] if variant.has_memory else []
        )
        self.bound: Any = variant.bind(self.weights, shared) if variant.has_memory else None
        self.x = torch.randn(S, SHAPE.rows(form) // S, PRESET.width, requires_grad=True)
        made: list[Tensor] = []
        self.forward = flops(lambda: made.append(variant.step(self.x, self.weights, self.bound, 0.0)))
        self.y = made[0]
        self.backward = flops(lambda: torch.autograd.grad(self.y.sum(), [self.x, *leaves]))


@pytest.mark.parametrize("form", sorted(EAGER))
def test_flops_are_what_pytorch_counts(form: str) -> None:
    eager = Eager(form)
    assert ffn_forward(form, SHAPE).flops == eager.forward
    if form == "concatenated":
        return  # its copies' gradients are sums, not products
    n, d, m, r = S * T, PRESET.width, SHAPE.slots, PRESET.rank
    # Autograd keeps x Wᵀ and visual·A, which this package computes again.
    again = 2 * n * d * r + 2 * n * m * r if form == "factored" else 0
    assert ffn_backward(form, SHAPE).flops == eager.backward + again


@pytest.mark.parametrize("form", ["text", "prompt", "plain", "factored", "concatenated"])
def test_forward_bytes_are_those_of_the_tensors(form: str) -> None:
    eager = Eager(form)
    weights, bound = eager.weights, eager.bound
    read = [weights.gate] if form == "concatenated" else list(vars(weights).values())
    read += [t for t in vars(bound).values() if isinstance(t, Tensor)] if bound is not None else []
    assert ffn_forward(form, SHAPE).bytes == sum(t.nbytes for t in (eager.x, *read, eager.y))


def test_attention_counts_each_visible_pair() -> None:
    queries, cached = 4, 6
    visible = sum(1 for _ in range(S) for q in range(queries) for k in range(cached + queries) if k <= cached + q)
    d, kv, n = PRESET.width, PRESET.kv_width, S * queries
    projections = [(d, d), (d, kv), (d, kv), (d, d)]
    products = sum(2 * n * rows * columns for rows, columns in projections) + 2 * 2 * visible * d
    numbers = sum(rows * columns for rows, columns in projections) + 2 * S * kv * (cached + queries) + 2 * n * d
    assert attention(PRESET, sequences=S, queries=queries, cached=cached, element=2) == Count(products, 2 * numbers)


@pytest.mark.parametrize("name", ["core", "dcore"])
def test_the_core_kernels_count_their_products_and_tensors(name: str) -> None:
    setting = settle(parser("", program="kernels").parse_args(["--device", "cpu", "--quick"]), cpu={}, cuda={})
    operands = Operands(setting, SHAPE)
    moved = [operands.core, *operands.reference(name, torch.float32).values()]
    moved += [operands.c] if name == "core" else [operands.e, operands.core_scores]
    assert kernel(name, SHAPE) == Count(flops(operands.products(name)), sum(t.nbytes for t in moved))


@pytest.mark.parametrize(
    ("form", "sequences", "tokens", "microseconds"),
    [
        ("text", 1, 1, 62.9), ("plain", 1, 1, 64.1), ("positions", 1, 1, 64.7), ("factored", 1, 1, 64.4),
        ("plain", 16, 1, 82.4), ("positions", 16, 1, 73.9), ("factored", 16, 1, 64.7),
        ("plain", 64, 1, 140.9), ("positions", 64, 1, 103.2), ("factored", 64, 1, 65.7),
        ("text", 16, 512, 2805), ("plain", 16, 512, 2860),
    ],
)  # fmt: skip
def test_llama_7b_on_an_h200_as_worked_out_on_paper(
    form: str, sequences: int, tokens: int, microseconds: float
) -> None:
    """At 790 TFLOP/s and 4.3 TB/s; the paper sums leave out x and y, at most 0.3 µs."""
    shape = FFNShape.of(PRESETS["llama-7b"], sequences=sequences, tokens=tokens, visual_tokens=256, element=2)
    bound = Peaks(790, 4300, 4300).bound_ms(ffn_forward(form, shape)) * 1e3
    assert bound == pytest.approx(microseconds, rel=0.004)
