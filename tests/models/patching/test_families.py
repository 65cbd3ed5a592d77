"""Every family against an independent float64 forward: hooks on a plain model, memory materialised as the paper writes it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from memvp_kernels import MemVPConfig, MemVPModel
from tests import tolerance
from tests.models.tiny import (
    CONFIG,
    ENCODER_DECODERS,
    FAMILIES,
    WIDTH,
    features,
    language_model,
    oracle,
    tokens,
    with_memory,
)

EXACT: dict[str, Any] = {"rtol": tolerance.FLOAT64, "atol": tolerance.FLOAT64}


def _inputs(family: str) -> dict[str, torch.Tensor]:
    labels = tokens(3, 4, seed=8) if family in ENCODER_DECODERS else tokens(3, 5)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": tokens(3, 5), "attention_mask": mask, "labels": labels}


def _gradients(model: MemVPModel) -> list[torch.Tensor]:
    parts = [model.key_position, model.value_position, *model.projector.parameters()]
    return [p.grad for p in parts]


def _ratios(mine: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Our error over PyTorch's, in norm and at the worst element."""
    ours, plain = ((t.double() - exact).abs() for t in (mine, theirs))
    return [(ours.norm() / plain.norm()).item(), (ours.max() / plain.max()).item()]


def _check(family: str, config: MemVPConfig, base: nn.Module | None = None) -> None:
    base = language_model(family).double() if base is None else base
    model = with_memory(base, config)
    plain = language_model(family).double()
    images = features(4, 0, 10)
    out = model(image_features=images, **_inputs(family))
    wanted, gradients = oracle(plain, model, images, **_inputs(family))
    torch.testing.assert_close(out.logits, wanted.logits, **EXACT)
    without = plain(**_inputs(family)).logits
    assert (without - wanted.logits).abs().max() > 1e-2, "the memory is too weak for this test to see it"
    out.loss.backward()
    torch.testing.assert_close(_gradients(model), gradients, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_are_the_papers(family: str) -> None:
    _check(family, CONFIG)


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bart"])
def test_positions_per_layer(family: str) -> None:
    _check(family, dataclasses.replace(CONFIG, shared_positions=False))


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("shared", [True, False])
def test_chosen_layers_only(family: str, shared: bool) -> None:
    _check(family, dataclasses.replace(CONFIG, layers=(1,), shared_positions=shared))


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_ffns_fuse(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The FFN's own linears are not called: the operator reads their weights."""
    from memvp_kernels.models.patching.weights import Matrices

    model = with_memory(language_model(family))
    assert all(isinstance(ffn.ffn_matrices(), Matrices) for _, ffn in model.memory_ffns())
    inside = [m for _, ffn in model.memory_ffns() for m in ffn.modules() if isinstance(m, nn.Linear)]
    names = {id(m) for m in inside if WIDTH in m.weight.shape and m.weight.shape != (WIDTH, WIDTH)}
    called: list[nn.Module] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (called.append(self), forward(self, x))[1])
    model(image_features=features(4, 0, 10), **_inputs(family))
    assert called
    assert len(names) == len(model.memory_ffns()) * (3 if family == "llama" else 2)
    assert not [m for m in called if id(m) in names]


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_an_ffn_is_looked_up_once_per_forward(family: str, opaque: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_memory(language_model(family))
    if opaque:
        for _, ffn in model.memory_ffns():
            next(m for m in ffn._modules.values() if isinstance(m, nn.Linear)).register_forward_hook(lambda *args: None)
    looked: list[nn.Module] = []
    for kind in {type(ffn) for _, ffn in model.memory_ffns()}:
        own = kind.ffn_matrices
        monkeypatch.setattr(kind, "ffn_matrices", lambda self, own=own: (looked.append(self), own(self))[1])
    for _ in range(2):  # nothing of the first is kept for the second
        looked.clear()
        model(image_features=features(4, 0, 10), **_inputs(family))
        assert sorted(map(id, looked)) == sorted(id(ffn) for _, ffn in model.memory_ffns())


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_text_only_is_the_base_model(family: str) -> None:
    base = language_model(family)
    wanted = base(**_inputs(family)).logits
    exact = language_model(family).double()(**_inputs(family)).logits
    model = MemVPModel(base, CONFIG).eval()
    got = model(**_inputs(family)).logits
    rounding = (wanted - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float16), *((family, torch.bfloat16) for family in ("llama", "gemma", "t5", "bart"))],
)
def test_half_precision_base_with_float32_memory(family: str, dtype: torch.dtype) -> None:
    """As the paper trains: error of output and gradients at most twice that of plain PyTorch in that dtype.

    The median of several models: where relu's argument is near zero, rounding decides a whole gradient, for either side.
    """
    ratios = []
    for seed in range(15 if family == "t5" else 5):
        base, other = (language_model(family, seed).to(dtype) for _ in range(2))
        model = with_memory(base)
        images = features(4, 0, 10)
        out = model(image_features=images, **_inputs(family))
        assert out.logits.dtype == dtype
        out.loss.backward()
        mine = [out.logits, *_gradients(model)]
        assert all(g.dtype == torch.float32 for g in mine[1:])
        exact, exact_gradients = oracle(other, model, images, **_inputs(family))
        theirs, their_gradients = oracle(other, model, images, dtype=dtype, factored=True, **_inputs(family))
        pairs = zip(mine, [theirs.logits, *their_gradients], [exact.logits, *exact_gradients], strict=True)
        ratios.append([ratio for m, t, e in pairs for ratio in _ratios(m, t, e)])
    assert all(statistics.median(column) <= 2 for column in zip(*ratios, strict=True)), ratios


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart"])
def test_training_keeps_the_familys_own_dropout(family: str) -> None:
    """With its inner dropout on, the FFN runs as it is, so the same seed drops what the plain model drops."""
    base, other = language_model(family).double().train(), language_model(family).train()
    for module in (*base.modules(), *other.modules()):
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = 0.2
    model = with_memory(base)
    torch.manual_seed(5)
    got = model(image_features=features(4, 0, 10), **_inputs(family)).logits
    torch.manual_seed(5)
    wanted, _ = oracle(other, model, features(4, 0, 10), **_inputs(family))
    torch.testing.assert_close(got, wanted.logits, **EXACT)


def test_unknown_models_are_refused_with_the_list() -> None:
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*supported are LLaMA, Mistral, Qwen2.*T5, mT5, BART"):
        MemVPModel(gpt2, CONFIG)
    with pytest.raises(ValueError, match="no layer that can be given memory"):
        MemVPModel(nn.Linear(2, 2), CONFIG)
    assert all(p.requires_grad for p in gpt2.parameters())


def test_an_activation_that_the_operator_lacks_is_refused() -> None:
    base = language_model("llama")
    base.model.layers[1].mlp.act_fn = nn.Tanh()
    with pytest.raises(ValueError, match=r"model\.layers\.1: its activation Tanh"):
        MemVPModel(base, CONFIG)
    assert type(base.model.layers[0]) is type(language_model("llama").model.layers[0])


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers \[2\] do not exist: the language model has 2 layers, 0 to 1"):
        MemVPModel(language_model("llama"), dataclasses.replace(CONFIG, layers=(0, 2)))
