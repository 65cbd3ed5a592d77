"""A frozen base in 4 or 8 bits: the memory trains through it exactly as through its own modules, and nothing of it is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels.models import site
from memvp_kernels.models.quantised import Quantised, read_quantised
from memvp_kernels.models.weights import Opaque, Packed
from tests.scale.processes import Group
from tests.scale.tiny import adapter_gradients, batch, difference, language_model, memvp_model

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
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, make(child))
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


def _run(model: Any, monkeypatch: pytest.MonkeyPatch, few: int) -> tuple[Tensor, dict[str, Tensor]]:
    monkeypatch.setattr(site, "_FEW_TOKENS", few)
    model.zero_grad()
    loss = model(**batch(length=LONG, without=(1,))).loss
    loss.backward()
    return loss.detach(), adapter_gradients(model)


@pytest.mark.parametrize("name", list(BASES))
def test_restored_matrices_train_like_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both roads over the same quantised base; gradients of a lower layer's memory went through a higher FFN's x."""
    model = memvp_model(BASES[name]())
    weights = [ffn.ffn_matrices() for _, ffn in model.memory_ffns()]
    assert all(isinstance(found, Packed) for found in weights), weights
    runs: list[bool] = []
    monkeypatch.setattr(site, "_restored", _counting(site._restored, runs))
    loss, gradients = _run(model, monkeypatch, few=10**6)
    assert not runs
    again, restored = _run(model, monkeypatch, few=0)
    assert runs == [True, True]
    assert difference(again, loss) < 1e-6
    for parameter, wanted in gradients.items():
        assert difference(restored[parameter], wanted) < 1e-5, parameter


def _counting(function: Any, runs: list[bool]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(True)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("name", list(BASES))
def test_a_restored_matrix_is_the_one_that_the_module_uses(name: str) -> None:
    """By type: `hasattr(weight, "dequantize")` is true for every tensor, and gives packed bytes as numbers for some."""
    linear = BASES[name]().model.layers[0].mlp.up_proj
    found = read_quantised(linear)
    assert isinstance(found, Quantised)
    restored = found.restore(torch.float32)
    module = linear(torch.eye(linear.in_features)).T - (0 if linear.bias is None else linear.bias[:, None])
    assert restored.shape == (linear.out_features, linear.in_features)
    assert difference(restored, module) < 1e-6


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


@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_restored_matrix_outlives_its_call(name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_FEW_TOKENS", 0)
    base = BASES[name]()
    for layer in base.model.layers:  # a number of elements that nothing else has
        assert layer.mlp.up_proj.out_features * layer.mlp.up_proj.in_features == 64 * 32
    model = memvp_model(base)
    if checkpointing:
        model.gradient_checkpointing_enable()
    gc.collect()
    before = _tensors_of(64 * 32)
    loss = model(**batch(length=LONG)).loss
    assert _tensors_of(64 * 32) == before
    loss.backward()
    del loss
    gc.collect()
    assert _tensors_of(64 * 32) == before


def _tensors_of(elements: int) -> int:
    return sum(
        isinstance(t, Tensor) and type(t) in (Tensor, nn.Parameter) and t.is_floating_point() and t.numel() == elements
        for t in gc.get_objects()
    )


WIDER: dict[str, Callable[[], Any]] = {  # bitsandbytes packs 64 at a time for some CPUs
    "bitsandbytes nf4": lambda: _nf4(language_model(hidden_size=64, intermediate_size=128)),
    **{name: made for name, made in BASES.items() if name.startswith("torchao")},
}


@pytest.mark.parametrize("name", list(WIDER))
def test_generation(name: str) -> None:
    """A long prompt takes the restored matrices, the tokens after it the module's own kernels; then a long one again.

    On some CPUs bitsandbytes repacks its weights in the first call without gradients, and restoring them as before would give
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
    assert difference(again, before) < 1e-2  # the repacked kernels compute in bfloat16


def test_dropout_draws_one_mask_for_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the module road under the same seed: the masks are functions of the seed alone."""
    from dataclasses import replace

    from tests.scale.tiny import CONFIG

    model = memvp_model(BASES["torchao int8"](), replace(CONFIG, dropout=0.4))
    torch.manual_seed(7)
    loss, gradients = _run(model, monkeypatch, few=10**6)
    torch.manual_seed(7)
    again, restored = _run(model, monkeypatch, few=0)
    assert difference(again, loss) < 1e-6
    for parameter, wanted in gradients.items():
        assert difference(restored[parameter], wanted) < 1e-5, parameter


def test_lora_beside_the_memory_on_a_4_bit_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA's setting: LoRA on attention leaves the FFNs restored, LoRA on an FFN leaves it opaque; both train."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(site, "_FEW_TOKENS", 0)
    for targets, kind in ((["q_proj", "v_proj"], Packed), (["up_proj"], Opaque)):
        base = peft.get_peft_model(BASES["bitsandbytes nf4"](), peft.LoraConfig(target_modules=targets, r=2))
        model = memvp_model(base)
        assert all(isinstance(ffn.ffn_matrices(), kind) for _, ffn in model.memory_ffns())
        model(**batch(length=LONG)).loss.backward()
        trained = [name for name, p in model.named_parameters() if p.grad is not None]
        assert any("lora_B" in name for name in trained)
        assert any(name.startswith("memory.") for name in trained)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def _sharded_nf4(storage: torch.dtype) -> dict[str, float]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    site._FEW_TOKENS = 0
    found = []
    for shard in (False, True):
        model: Any = memvp_model(_nf4(language_model(), storage=storage))
        if shard:
            for layer in model.language_model.model.layers:
                fully_shard(layer)
            fully_shard(model.language_model)
            model.memory = DistributedDataParallel(model.memory)
        model(**batch(length=LONG)).loss.backward()
        found.append(adapter_gradients(model))
    return {name: difference(found[1][name], wanted) for name, wanted in found[0].items()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=["uint8", "float32"])
def test_a_sharded_4_bit_base(two: Group, storage: torch.dtype) -> None:
    """FSDP2 gathers into a plain parameter without a quantisation state: it is read from the module."""
    pytest.importorskip("bitsandbytes", reason=EXTRA)
    for errors in two.run(_sharded_nf4, storage):
        assert all(error < 1e-5 for error in errors.values()), errors


def _data_parallel(name: str, entire: bool) -> dict[str, float]:
    from torch.nn.parallel import DistributedDataParallel

    from tests.scale.test_data_parallel import part

    whole = memvp_model(BASES[name]())
    whole(**batch(length=LONG, without=(2, 3))).loss.backward()
    model: Any = memvp_model(BASES[name]())
    if entire:
        entry = DistributedDataParallel(model)
    else:
        entry, model.memory = model, DistributedDataParallel(model.memory)
    entry(**part(batch(length=LONG, without=(2, 3)))).loss.backward()
    wanted = adapter_gradients(whole)
    return {name: difference(gradient, wanted[name]) for name, gradient in adapter_gradients(model).items()}


@pytest.mark.parametrize(
    ("name", "entire"), [("bitsandbytes nf4", True), ("bitsandbytes nf4", False), ("torchao int8", False)]
)
def test_ddp_over_a_quantised_base(two: Group, name: str, entire: bool) -> None:
    """torchao's tensors do not take DDP's first broadcast: there the memory alone is wrapped, as the recipe does anyway."""
    pytest.importorskip(name.split()[0], reason=EXTRA)
    for errors in two.run(_data_parallel, name, entire):
        assert all(error < 1e-5 for error in errors.values()), errors
