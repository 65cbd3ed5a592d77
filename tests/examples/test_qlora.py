"""The 4-bit example's parts; what it learns is for the program itself to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

REASON = "needs the `quantized` extra and peft: pip install memvp_kernels[quantized] peft"
pytest.importorskip("bitsandbytes", reason=REASON)
pytest.importorskip("peft", reason=REASON)

import qlora  # noqa: E402
from tiny_vqa import digits, language_model  # noqa: E402
from tiny_vqa.training import train  # noqa: E402

WORDS = digits.vocabulary()


@pytest.fixture(scope="module")
def methods() -> list[Any]:
    torch.manual_seed(0)
    base = language_model.build(WORDS, width=digits.WIDTH, layers=digits.LAYERS).eval()
    return list(qlora.methods_of(base))


def test_what_trains_beside_what_is_quantized(methods: list[Any]) -> None:
    whole, nf4, adapted = methods
    memory = sum(p.numel() for p in whole.trained())
    assert sum(p.numel() for p in nf4.trained()) == memory
    lora = digits.LAYERS * 2 * 2 * qlora.RANK * digits.WIDTH
    assert sum(p.numel() for p in adapted.trained()) == memory + lora
    assert all(p.dtype == torch.float32 for method in methods for p in method.trained())
    assert qlora.held(adapted.model) == qlora.held(nf4.model) < qlora.held(whole.model) / 5


def test_everything_that_should_train_does_and_nothing_else(methods: list[Any]) -> None:
    known, _ = digits.load()
    before = [{name: p.detach().clone() for name, p in c.model.named_parameters()} for c in methods]
    held_out, batches = digits.one_each(digits.Images(*(part[:4] for part in known))), digits.batches(known, rows=4)
    train(
        methods,
        WORDS,
        known.features,
        batches,
        steps=2,
        learning_rates=[0.01] * 3,
        held_out=(known.features, held_out),
        looks=1,
    )
    for method, was in zip(methods, before, strict=True):
        for name, parameter in method.model.named_parameters():
            assert torch.equal(parameter, was[name]) != parameter.requires_grad, name
