"""FFNs and layers that somebody replaced, patched or shared: the image is used, or an error says what to do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memvp_kernels import MemVPModel
from memvp_kernels.models.patching.patch import Patch
from tests.models.tiny import CONFIG, IMAGES, KINDS, features, inputs, language_model, oracle, tokens, with_memory
from tests.models.tools import train_without_dropout


def _layers(base: nn.Module) -> list[Any]:
    return [m for m in base.modules() if type(m).__name__.endswith(("DecoderLayer", "EncoderLayer", "Block"))]


def _ffn(layer: Any) -> Any:
    return layer.mlp if hasattr(layer, "mlp") else layer.layer[-1].DenseReluDense


@pytest.mark.parametrize("family", [f for f in KINDS if f != "bart"])
def test_an_ffn_replaced_beforehand_works(family: str) -> None:
    """The order for libraries that set a forward on instances: theirs first. What they compute is called."""
    base, plain = language_model(family).double(), language_model(family).double()
    for model in (base, plain):
        for layer in _layers(model):
            ffn = _ffn(layer)
            ffn.forward = types.MethodType(lambda self, x, own=ffn.forward: 2 * own(x), ffn)
    before = [sorted(vars(module)) for module in base.modules()]
    model = with_memory(base)
    wanted, gradients = oracle(plain, model, IMAGES, **inputs())
    out = model(image_features=IMAGES, **inputs())
    torch.testing.assert_close(out.logits, wanted.logits)
    torch.testing.assert_close(torch.autograd.grad(out.loss, model.key_position)[0], gradients[0])
    with torch.no_grad():
        bare = plain(**inputs()).logits
        torch.testing.assert_close(model.language_model(**inputs()).logits, bare)
        torch.testing.assert_close(copy.deepcopy(model)(image_features=IMAGES, **inputs()).logits, wanted.logits)
        assert torch.equal(model.unload()(**inputs()).logits, bare)
    assert [sorted(vars(module)) for module in base.modules()] == before


def test_a_forward_of_the_class_survives_pickling() -> None:
    """A bound method unpickles by its name."""
    base = language_model()
    for layer in base.model.layers:
        layer.mlp.forward = types.MethodType(type(layer.mlp).forward, layer.mlp)
    model = with_memory(base)
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        torch.testing.assert_close(
            again(image_features=IMAGES, **inputs()).logits, model(image_features=IMAGES, **inputs()).logits
        )


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("what", ["ffn", "layer"])
@pytest.mark.parametrize("how", ["forward", "module"])
def test_replaced_afterwards_is_noticed(family: str, what: str, how: str) -> None:
    """In forward, generate and explain_memory, where one layer of several is replaced."""
    model = with_memory(language_model(family))
    plain = language_model(family)
    layer, own = _layers(model.language_model)[-1], _layers(plain)[-1]
    if what == "ffn" and family != "bart":
        layer, own = _ffn(layer), _ffn(own)
    if how == "forward":
        layer.forward = types.MethodType(type(own).forward, layer)
    else:
        _swap(model.language_model, layer, own)
    refused = pytest.raises(RuntimeError, match=r"ran without the image, because something replaced.*wrap")
    with refused:
        model(image_features=IMAGES, **inputs())
    with refused:
        model.generate(tokens(3), image_features=IMAGES, max_new_tokens=2)
    with refused:
        model.explain_memory(image_features=IMAGES, **inputs())
    with torch.no_grad():
        assert model.language_model(**inputs()).logits.isfinite().all()


def _swap(top: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in top.modules():
        for name, child in list(module._modules.items()):
            if child is old:
                module._modules[name] = new


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_wrapper_set_afterwards_keeps_the_memory(family: str) -> None:
    """Decorated and compiled forwards call the one that they found."""
    model = with_memory(language_model(family))
    with torch.no_grad():
        wanted = model(image_features=IMAGES, **inputs()).logits
        calls: list[int] = []
        for layer in _layers(model.language_model):
            modules = [layer] if family == "bart" else [layer, _ffn(layer)]
            for module in modules:
                module.forward = lambda *a, own=module.forward, **k: (calls.append(1), own(*a, **k))[1]
        assert torch.equal(model(image_features=IMAGES, **inputs()).logits, wanted)
        assert calls


def test_compiled_layers_keep_the_memory() -> None:
    torch._dynamo.reset()
    model = with_memory(language_model())
    with torch.no_grad():
        wanted = model(image_features=IMAGES, **inputs()).logits
        for layer in model.language_model.model.layers:
            layer.forward = torch.compile(layer.forward, backend="eager")
        torch.testing.assert_close(model(image_features=IMAGES, **inputs()).logits, wanted)
        model.generate(tokens(3), image_features=IMAGES, max_new_tokens=2)


def test_layers_that_rightly_do_not_run() -> None:
    """An encoder whose outputs are given, and BART's layer dropout."""
    for family in ("t5", "bart"):
        model = with_memory(language_model(family))
        with torch.no_grad():
            encoded = model.language_model.get_encoder()(input_ids=tokens(3))
            assert (
                model(encoder_outputs=encoded, image_features=IMAGES, decoder_input_ids=tokens(3))
                .logits.isfinite()
                .all()
            )
    model.language_model.model.decoder.layerdrop = 1.0
    assert model.train()(image_features=IMAGES, **inputs()).loss.isfinite()


class SwiGLU(nn.Module):
    """Shaped like Liger's class: no act_fn, the activation's name in the configuration."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.config = mlp.config
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_librarys_class_for_the_ffn_works_when_it_comes_first() -> None:
    base, plain = language_model().double(), language_model().double()
    for layer in base.model.layers:
        layer.mlp = SwiGLU(layer.mlp)
    model = with_memory(base)
    wanted, _ = oracle(plain, model, IMAGES, **inputs())
    torch.testing.assert_close(model(image_features=IMAGES, **inputs()).logits, wanted.logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5-gated"])
@pytest.mark.parametrize("shared", [True, False], ids=["one position pair", "a pair per layer"])
def test_layers_that_share_an_ffn(family: str, shared: bool) -> None:
    base = language_model(family).double()
    first, *others = _layers(base)
    for layer in others:
        if hasattr(layer, "mlp"):
            layer.mlp = first.mlp
        else:
            layer.layer[-1].DenseReluDense = first.layer[-1].DenseReluDense
    plain, before = copy.deepcopy(base), [type(module) for module in base.modules()]
    model = with_memory(base, dataclasses.replace(CONFIG, shared_positions=shared))
    assert len(model.memory_ffns()) == 1 + len(others)
    untied = copy.deepcopy(plain)
    for layer in _layers(untied)[1:]:
        if hasattr(layer, "mlp"):
            layer.mlp = copy.deepcopy(layer.mlp)
        else:
            layer.layer[-1].DenseReluDense = copy.deepcopy(layer.layer[-1].DenseReluDense)
    wanted, gradients = oracle(untied, model, IMAGES, **inputs())
    out = model(image_features=IMAGES, **inputs())
    torch.testing.assert_close(out.logits, wanted.logits)
    torch.testing.assert_close(torch.autograd.grad(out.loss, model.key_position)[0], gradients[0])
    assert [type(module) for module in model.unload().modules()] == before
    torch.testing.assert_close(base(**inputs()).logits, plain(**inputs()).logits)


def test_a_layer_that_runs_twice() -> None:
    base = language_model().double()
    base.model.layers[1] = base.model.layers[0]
    model = with_memory(base)
    a, b = (model(image_features=features(4, 4, 4, seed=seed), **inputs()) for seed in (1, 2))
    assert not torch.equal(a.logits, b.logits)
    a.loss.backward()
    assert model.key_position.grad is not None
    assert type(model.unload().model.layers[0]).forward is type(language_model().model.layers[0]).forward


@pytest.mark.parametrize("given", ["meta-llama/Llama-2-7b", None, {"a": 1}])
def test_what_is_no_model_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match=r"language_model: wanted a transformers model.*from_pretrained"):
        MemVPModel(given, CONFIG)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_new_model_of_the_same_type_is_plain(family: str) -> None:
    """type(model)(config): what transformers' and users' code writes to get one like it."""
    model = with_memory(language_model(family))
    new = type(model.language_model)(model.language_model.config)
    assert type(new) is type(language_model(family)) and not any(isinstance(m, Patch) for m in new.modules())
    with_memory(new.eval())(image_features=IMAGES, **inputs())
    assert type(new) is not type(language_model(family))


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_disabled_memory(family: str) -> None:
    """The language model's own output, in this thread and block alone, also compiled and generated."""
    base = language_model(family)
    with torch.no_grad():
        bare = base(**inputs()).logits
        text = base.generate(tokens(3), max_new_tokens=3)
        model = with_memory(base)
        other = with_memory(language_model(family))
        wanted = model(image_features=IMAGES, **inputs()).logits
        with model.disable_memory():
            assert torch.equal(model(image_features=IMAGES, **inputs()).logits, bare)
            assert torch.equal(model.generate(tokens(3), image_features=IMAGES, max_new_tokens=3), text)
            assert torch.equal(other(image_features=IMAGES, **inputs()).logits, wanted)
            with model.disable_memory():
                pass
            assert torch.equal(model(**inputs()).logits, bare)
        assert torch.equal(model(image_features=IMAGES, **inputs()).logits, wanted)


def test_disabled_memory_compiles() -> None:
    torch._dynamo.reset()
    model = with_memory(language_model())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        images = torch.stack(features(4, 4, 4))
        for _ in range(2):
            torch.testing.assert_close(
                compiled(image_features=images, **inputs()).logits, model(image_features=images, **inputs()).logits
            )
            with model.disable_memory():
                assert torch.equal(
                    compiled(image_features=images, **inputs()).logits, model.language_model(**inputs()).logits
                )


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "t5-gated", "bart"])
@pytest.mark.parametrize("opaque", [False, True], ids=["fused", "opaque"])
def test_an_ffns_output_may_be_changed_in_place(family: str, opaque: bool) -> None:
    """Activation steering, also under activation checkpointing: what the same hook gives out of place."""

    def step(in_place: bool, checkpointing: bool) -> tuple[Tensor, Tensor]:
        model = with_memory(language_model(family).double())
        for _, ffn in model.memory_ffns():
            steered = ffn._modules["fc2"] if family == "bart" and opaque else ffn
            steered.register_forward_hook(lambda module, args, y: y.mul_(1.5).add_(0.1) if in_place else y * 1.5 + 0.1)
            if opaque:
                next(m for m in ffn.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: None)
        if checkpointing:
            train_without_dropout(model).activation_checkpointing_enable()
        loss = model(image_features=IMAGES, **inputs()).loss
        return loss.detach(), torch.autograd.grad(loss, model.key_position)[0]

    wanted = step(False, False)
    torch.testing.assert_close(step(True, False), wanted)
    torch.testing.assert_close(step(True, True), wanted)
