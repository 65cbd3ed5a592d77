"""FFNs that are not plain linears run as they are, and the memory is added: LoRA, hooks, quantized and replaced linears."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memvp_kernels import MemVPModel
from memvp_kernels.models.patching import feed_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque, activation_name
from tests.models.tiny import CONFIG, IMAGES, inputs, language_model, oracle, tokens, with_memory

peft = pytest.importorskip("peft")
TARGETS = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "t5-gated": ["q", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "fc1", "fc2"],
}


class Int8Linear(nn.Module):
    """A quantized linear as the libraries make them: integer weights, scales, a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def _lora(base: nn.Module, family: str) -> Any:
    torch.manual_seed(6)
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS[family], r=2, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return lora.eval()


def _plain_lora(family: str) -> nn.Module:
    """The same LoRA, merged into plain linears, for the oracle."""
    return _lora(language_model(family).double(), family).merge_and_unload()


@pytest.mark.parametrize("family", TARGETS)
def test_lora_before_memory(family: str) -> None:
    """The LoRA keeps training; base and memory do as they would without it."""
    lora = _lora(language_model(family).double(), family)
    model = with_memory(lora)
    out = model(image_features=IMAGES, **inputs())
    wanted, _ = oracle(_plain_lora(family), model, IMAGES, **inputs())
    torch.testing.assert_close(out.logits, wanted.logits)
    out.loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {n for n, p in model.named_parameters() if "lora" in n or n.startswith("memory.")}
    got = model.generate(input_ids=tokens(3), image_features=IMAGES, max_new_tokens=3, num_beams=2)
    assert got.shape[0] == 3


@pytest.mark.parametrize("family", TARGETS)
def test_lora_after_memory(family: str) -> None:
    model = with_memory(language_model(family).double())
    model.language_model = _lora(model.language_model, family)
    out = model(image_features=IMAGES, **inputs())
    wanted, _ = oracle(_plain_lora(family), model, IMAGES, **inputs())
    torch.testing.assert_close(out.logits, wanted.logits)
    model.unload()
    torch.testing.assert_close(model.language_model(**inputs()).logits, _plain_lora(family)(**inputs()).logits)


def test_merged_lora_fuses_again() -> None:
    model = with_memory(language_model().double())
    lora = _lora(model.language_model, "llama")
    assert all(isinstance(ffn.ffn_matrices(), Opaque) for _, ffn in model.memory_ffns())
    model.language_model = lora.merge_and_unload()
    assert all(isinstance(ffn.ffn_matrices(), Matrices) for _, ffn in model.memory_ffns())
    wanted, _ = oracle(_plain_lora("llama"), model, IMAGES, **inputs())
    torch.testing.assert_close(model(image_features=IMAGES, **inputs()).logits, wanted.logits)


@pytest.mark.parametrize("family", TARGETS)
def test_quantized_linears(family: str) -> None:
    def quantized() -> nn.Module:
        base = language_model(family).double()
        for module in list(base.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name in TARGETS[family]:
                    setattr(module, name, Int8Linear(child))
        return base

    model = with_memory(quantized())
    out = model(image_features=IMAGES, **inputs())
    plain = quantized()
    wanted, gradients = oracle(plain, model, IMAGES, **inputs())
    torch.testing.assert_close(out.logits, wanted.logits)
    out.loss.backward()
    torch.testing.assert_close(model.key_position.grad, gradients[0])


def _doubled(linear: nn.Linear) -> None:
    linear.forward = lambda x, own=linear.forward: 2 * own(x)  # type: ignore[method-assign]


#: What somebody may do to a linear, after which its weight says no longer what it computes.
CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "a forward of its own": _doubled,
    "a hook": lambda linear: linear.register_forward_hook(lambda module, args, y: 2 * y),
    "a parametrization": lambda linear: nn.utils.parametrizations.weight_norm(
        linear
    ).parametrizations.weight.original0.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", TARGETS)
def test_a_changed_linear_is_called(family: str, change: str) -> None:
    model, other = with_memory(language_model(family).double()), language_model(family).double()
    for base in (model.language_model, other):
        CHANGES[change](next(m for n, m in base.named_modules() if n.endswith(f".{TARGETS[family][1]}")))
    wanted, _ = oracle(other, model, IMAGES, **inputs())
    torch.testing.assert_close(model(image_features=IMAGES, **inputs()).logits, wanted.logits)
    plain, _ = oracle(language_model(family).double(), model, IMAGES, **inputs())
    assert not torch.allclose(plain.logits, wanted.logits), "the change is not seen"


def test_an_ffn_class_patched_by_a_library_is_called() -> None:
    """Liger and others replace the class's forward; what they compute is theirs to say."""

    class Patched(type(language_model().model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, other = language_model().double(), language_model().double()
    for base in (model, other):
        base.model.layers[1].mlp.__class__ = Patched
    wrapped = with_memory(model)
    assert [type(ffn.ffn_matrices()) for _, ffn in wrapped.memory_ffns()] == [Matrices, Opaque]
    Patched.__name__ = "PatchedMLP"  # the oracle goes by names
    wanted, _ = oracle(other, wrapped, IMAGES, **inputs())
    torch.testing.assert_close(wrapped(image_features=IMAGES, **inputs()).logits, wanted.logits)


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_t5s_float32_wo_beside_half_precision(family: str) -> None:
    """transformers keeps T5's wo in float32 under float16; the FFN then answers in float32, and so does ours."""
    base = language_model(family).half()
    for name, module in base.named_modules():
        if name.endswith("wo"):
            module.float()
    model = with_memory(base)
    seen: list[torch.dtype] = []
    with model.observing(lambda layer, x, y: seen.append(y.dtype)), torch.no_grad():
        got = model(image_features=IMAGES, **inputs()).logits
    assert set(seen) == {torch.float32}
    exact, _ = oracle(language_model(family), model, IMAGES, **inputs())
    theirs, _ = oracle(language_model(family), model, IMAGES, dtype=torch.float16, factored=True, **inputs())
    assert (got - exact.logits).norm() <= 2 * (theirs.logits - exact.logits).norm()


def test_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    feed_forward.log_opaque.cache_clear()
    with caplog.at_level(logging.WARNING, logger="memvp_kernels"):
        model = MemVPModel(_lora(language_model(), "llama"), CONFIG)
        for _ in range(2):
            model(image_features=IMAGES, **inputs())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "run as they are and the memory is added to their output: up_proj is a peft.tuners.lora" in lines[0]


def test_nothing_is_said_of_plain_linears(caplog: pytest.LogCaptureFixture) -> None:
    feed_forward.log_opaque.cache_clear()
    with caplog.at_level(logging.WARNING, logger="memvp_kernels"):
        MemVPModel(language_model(), CONFIG)(image_features=IMAGES, **inputs())
    assert not caplog.records


@pytest.mark.parametrize(
    "name", ["relu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "silu", "swish"]
)
def test_activation_names_mean_what_transformers_computes(name: str) -> None:
    from transformers.activations import ACT2FN

    known = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    ours = activation_name(ACT2FN[name])
    assert ours is not None
    # One of transformers' names has its sqrt(2 / pi) in ten digits.
    torch.testing.assert_close(known[ours](z), ACT2FN[name](z), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["quick_gelu", "relu2", "relu6", "tanh", "gelu_10", "mish", "linear"])
def test_activations_that_the_operator_lacks(name: str) -> None:
    from transformers.activations import ACT2FN

    assert activation_name(ACT2FN[name]) is None
