"""A frozen base in 4 or 8 bits: the memory trains through it exactly as through its own modules, and nothing of it is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels import autograd
from memvp_kernels.models.parallel.quantized import QuantizedLinear, read_quantized
from memvp_kernels.models.patching import feed_forward
from memvp_kernels.models.patching.weights import Opaque, QuantizedMatrices
from tests.models.parallel.processes import Group
from tests.models.parallel.test_data_parallel import assert_within, averaged, laid_out, part
from tests.models.parallel.tiny import (
    CONFIG,
    adapter_gradients,
    batch,
    difference,
    language_model,
    memvp_model,
    reference,
)
from tests.models.tools import fails_before

EXTRA = "needs the `quantized` extra: pip install memvp_kernels[quantized]"


def _nf4(base: Any, kind: str = "nf4", storage: torch.dtype = torch.uint8) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason=EXTRA)

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type=kind,
            quant_storage=storage,
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return _replaced(base, make)


def _bnb8(base: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason=EXTRA)

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, threshold=0.0
        )
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")

    return _replaced(base, make)


def _replaced(base: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    for layer in base.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, make(child))
    return base.requires_grad_(False)


def _torchao(base: Any, config: str) -> Any:
    pytest.importorskip("torchao", reason=EXTRA)
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    made = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    base.requires_grad_(False)
    quantization.quantize_(base.model.layers, made[config]())
    return base


BASES: dict[str, Callable[[], Any]] = {
    "bitsandbytes nf4": lambda: _nf4(language_model()),
    "bitsandbytes fp4": lambda: _nf4(language_model(), "fp4"),
    "bitsandbytes nf4, with biases": lambda: _nf4(language_model(mlp_bias=True)),
    "torchao int8": lambda: _torchao(language_model(), "int8"),
    "torchao float8": lambda: _torchao(language_model(), "float8"),
    "torchao int4": lambda: _torchao(language_model(), "int4"),
}
OPAQUE: dict[str, Callable[[], Any]] = {"bitsandbytes int8": lambda: _bnb8(language_model())}

LONG = 20  # 4 × 20 tokens: more than a handful


def _unpacked(packed: Any, **changes: Any) -> Any:
    """A plain language model with the matrices that `packed` dequantizes to."""
    base = language_model(**changes)
    for name, module in packed.named_modules():
        found = read_quantized(module)
        if isinstance(found, QuantizedLinear):
            with torch.no_grad():
                base.get_submodule(name).weight.copy_(found.dequantize(torch.float32))
    return base


def _run(model: Any, monkeypatch: pytest.MonkeyPatch, few: int) -> tuple[Tensor, dict[str, Tensor]]:
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", few)
    model.zero_grad()
    loss = model(**batch(length=LONG, without=(1,))).loss
    loss.backward()
    return loss.detach(), adapter_gradients(model)


@pytest.mark.parametrize("name", list(BASES))
def test_dequantized_matrices_train_like_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations over the same quantized base; gradients of a lower layer's memory went through a higher FFN's x."""
    model = memvp_model(BASES[name]())
    weights = [ffn.ffn_matrices() for _, ffn in model.memory_ffns()]
    assert all(isinstance(found, QuantizedMatrices) for found in weights), weights
    dequantized = mock.Mock(wraps=feed_forward._dequantized)
    monkeypatch.setattr(feed_forward, "_dequantized", dequantized)
    changes = {"mlp_bias": True} if "biases" in name else {}
    wanted = reference(batch(length=LONG, without=(1,)), base=lambda: _unpacked(BASES[name](), **changes))
    for few, runs in ((10**6, 0), (0, 2)):
        assert_within([wanted.errors(*_run(model, monkeypatch, few=few))])
        assert dequantized.call_count == runs


@pytest.mark.parametrize("name", list(BASES))
def test_a_dequantized_matrix_is_the_one_that_the_module_uses(name: str) -> None:
    """By type: `hasattr(weight, "dequantize")` is true for every tensor, and gives packed bytes as numbers for some."""
    linear = BASES[name]().model.layers[0].mlp.up_proj
    found = read_quantized(linear)
    assert isinstance(found, QuantizedLinear)
    dequantized = found.dequantize(torch.float32)
    module = linear(torch.eye(linear.in_features)).T - (0 if linear.bias is None else linear.bias[:, None])
    assert dequantized.shape == (linear.out_features, linear.in_features)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
    # a row of ones and zeros sums to the weight itself; adding the bias and taking it away rounds once each
    rounding = torch.finfo(torch.float32).eps * (module.abs() + bias.abs()[:, None])
    assert ((dequantized - module).abs() <= rounding).all()


@pytest.mark.parametrize("name", list(OPAQUE))
def test_a_product_that_rounds_activations_stays_the_module_s(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = memvp_model(OPAQUE[name]())
    found = model.memory_ffns()[0][1].ffn_matrices()
    assert isinstance(found, Opaque)
    assert "rounds the activations" in found.reason
    model(**batch()).loss.backward()
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in adapter_gradients(model).values())


def test_dynamic_activations_are_refused_in_training_and_serve() -> None:
    """torchao returns a result without a graph: the memory of lower layers would train on a part of its gradient."""
    model = memvp_model(_torchao(language_model(), "dynamic"))
    assert isinstance(model.memory_ffns()[0][1].ffn_matrices(), Opaque)
    with pytest.raises(RuntimeError, match=r"gives its input no gradient.*weight-only"):
        model(**batch())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(**batch()).loss)


def test_a_base_repacked_for_inference_is_refused_in_training() -> None:
    """bitsandbytes' repacked layers return results without a graph, too."""
    model = memvp_model(WIDER["bitsandbytes nf4"]()).eval()
    with torch.no_grad():
        model(**batch())
    state = model.language_model.model.layers[0].mlp.up_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes does not repack for this CPU (no AVX512-BF16)")
    with pytest.raises(RuntimeError, match="gives its input no gradient"):
        model.train()(**batch(length=LONG))


WIDE_FFN: dict[str, Callable[[], Any]] = {  # whose matrices are larger than anything else is
    "bitsandbytes nf4": lambda: _nf4(language_model(intermediate_size=200)),
    "torchao int8": lambda: _torchao(language_model(intermediate_size=200), "int8"),
}


@pytest.mark.parametrize("name", list(WIDE_FFN))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_dequantized_matrix_outlives_its_call(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0)
    model = memvp_model(WIDE_FFN[name]())
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch(samples=2)
    before = _matrices(200 * 32)  # of other tests
    loss = model(**inputs).loss
    assert _matrices(200 * 32) == before
    loss.backward()
    del loss
    assert _matrices(200 * 32) == before


def _matrices(elements: int) -> int:
    """Floating-point tensors that hold as much as a matrix, or more: one, or several in a row."""
    gc.collect()
    tensors = (t for t in gc.get_objects() if isinstance(t, Tensor) and type(t) in (Tensor, nn.Parameter))
    return sum(t.is_floating_point() and t.untyped_storage().nbytes() >= elements * t.element_size() for t in tensors)


def test_inference_keeps_nothing_for_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the positions reach the operator as the parameters they are, and still ask for gradients."""
    runs: list[int] = []
    run = autograd._run

    def recorded(problem: Any, module: Any, options: Any, keep: int, *rest: Any) -> Any:
        runs.append(keep)
        return run(problem, module, options, keep, *rest)

    monkeypatch.setattr(autograd, "_run", recorded)
    model = memvp_model(BASES["torchao int8"]())
    with torch.no_grad():
        model(**batch(length=LONG))
    assert runs == [0] * 2
    runs.clear()
    model(**batch(length=LONG)).loss.backward()
    # The first layer's input is frozen, so nothing goes through its hidden.
    assert runs == [autograd.KEEP_SCORES, autograd.KEEP_HIDDEN | autograd.KEEP_SCORES]


def test_own_kernels_for_a_few_tokens_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    feed_forward.log_opaque.cache_clear()
    model = memvp_model(BASES["torchao int8"]())
    assert not caplog.messages
    for _ in range(2):
        model(**batch())
    assert len(caplog.messages) == 1
    assert "matrices are quantized" in caplog.messages[0]


WIDER: dict[str, Callable[[], Any]] = {  # bitsandbytes packs 64 at a time for some CPUs
    "bitsandbytes nf4": lambda: _nf4(language_model(hidden_size=64, intermediate_size=128)),
    **{name: made for name, made in BASES.items() if name.startswith("torchao")},
}


@pytest.mark.parametrize("name", list(WIDER))
def test_generation(name: str) -> None:
    """A long prompt takes the dequantized matrices, the tokens after it the module's own kernels; then a long one again.

    On some CPUs bitsandbytes repacks its weights in the first call without gradients, and dequantizing them as before would give
    noise.
    """
    model = memvp_model(WIDER[name]()).eval()
    inputs = {k: v for k, v in batch(length=LONG).items() if k != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=True)
        whole = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
        again = model(**inputs).logits
    assert torch.equal(out, whole)
    sizes = {"hidden_size": 64, "intermediate_size": 128} if name.startswith("bitsandbytes") else {}
    plain, half = (memvp_model(_unpacked(WIDER[name](), **sizes).to(t)).eval() for t in (torch.float32, torch.bfloat16))
    with torch.no_grad():  # the repacked kernels compute in bfloat16
        limit = 2 * difference(half(**inputs).logits, plain(**inputs).logits)
    assert difference(again, before) <= limit


def test_dropout_draws_one_mask_for_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are functions of the seed alone, so that a plain base in float64 drops the same."""
    config = replace(CONFIG, dropout=0.4)
    inputs = batch(length=LONG, without=(1,))
    wanted = reference(inputs, config=config, base=lambda: _unpacked(BASES["torchao int8"]()), seed=7)
    model = memvp_model(BASES["torchao int8"](), config)
    for few in (10**6, 0):
        torch.manual_seed(7)
        assert_within([wanted.errors(*_run(model, monkeypatch, few=few))])
    assert max(wanted.errors(*_run(model, monkeypatch, few=0)).values()) > 10, "another seed drops the same"


def test_lora_beside_the_memory_on_a_4_bit_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA's setting: LoRA on attention leaves the FFNs dequantized, LoRA on an FFN leaves it opaque; both train."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(feed_forward, "_FEW_TOKENS", 0)
    for targets, kind in ((["q_proj", "v_proj"], QuantizedMatrices), (["up_proj"], Opaque)):
        base = peft.get_peft_model(BASES["bitsandbytes nf4"](), peft.LoraConfig(target_modules=targets, r=2))
        model = memvp_model(base)
        assert all(isinstance(ffn.ffn_matrices(), kind) for _, ffn in model.memory_ffns())
        model(**batch(length=LONG)).loss.backward()
        trained = [name for name, p in model.named_parameters() if p.grad is not None]
        assert any("lora_B" in name for name in trained)
        assert any(name.startswith("memory.") for name in trained)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _sharded_nf4(storage: torch.dtype) -> dict[str, float]:
    feed_forward._FEW_TOKENS = 0
    wanted = reference(batch(length=LONG), base=lambda: _unpacked(_nf4(language_model(), storage=storage)))
    model, _ = laid_out("fsdp2-recipe", base=_nf4(language_model(), storage=storage))
    loss = model(**batch(length=LONG)).loss
    loss.backward()
    return wanted.errors(loss.detach(), adapter_gradients(model))


@pytest.mark.parametrize(
    "storage",
    [
        pytest.param(torch.uint8, marks=fails_before(torch_="2.13"), id="uint8"),
        pytest.param(torch.float32, id="float32"),
    ],
)
def test_a_sharded_4_bit_base(two: Group, storage: torch.dtype) -> None:
    """FSDP2 gathers into a plain parameter without a quantization state: it is read from the module."""
    pytest.importorskip("bitsandbytes", reason=EXTRA)
    assert_within(two.run(_sharded_nf4, storage))


def _data_parallel(name: str, layout: str) -> dict[str, float]:
    inputs = batch(length=LONG, without=(2, 3))
    wanted = reference(inputs, base=lambda: _unpacked(BASES[name]()))
    model, entry = laid_out(layout, base=BASES[name]())
    loss = entry(**part(inputs)).loss
    loss.backward()
    return wanted.errors(averaged(loss), adapter_gradients(model))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("bitsandbytes nf4", "ddp"), ("bitsandbytes nf4", "ddp-memory"), ("torchao int8", "ddp-memory")],
)
def test_ddp_over_a_quantized_base(two: Group, name: str, layout: str) -> None:
    """torchao's tensors do not take DDP's first broadcast: there the memory alone is wrapped, as the recipe does anyway."""
    pytest.importorskip(name.split()[0], reason=EXTRA)
    assert_within(two.run(_data_parallel, name, layout))
