"""MemVR on a tiny LLaVA: the official arithmetic at batch 1, a batch as its samples alone, no trace afterwards."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.models.relatives.memvr import visual_retracing

transformers = pytest.importorskip("transformers")

IMAGE, PAD, VOCABULARY, LAYERS = 90, 0, 96, 8
LOOKS = (1, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, max_position_embeddings=128,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=9
    )
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def prompt(*lengths: int, images: bool = True) -> dict[str, Tensor]:
    """Questions of these lengths behind an image each, padded on the left."""
    rows, masks = [], []
    for length in lengths:
        ids = torch.cat([torch.tensor([1] + [IMAGE] * (9 if images else 0)), torch.randint(3, IMAGE, (length,))])
        padding = max(lengths) - length
        rows.append(F.pad(ids, (padding, 0), value=PAD))
        masks.append(F.pad(torch.ones_like(ids), (padding, 0)))
    found = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return found | ({"pixel_values": torch.randn(len(lengths), 3, 12, 12).double()} if images else {})


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """As far as LLaMA's norms go, which are float32 whatever their input."""
    torch.testing.assert_close(found.float(), wanted.float())


def greedy(model: Any, inputs: dict[str, Tensor], tokens: int) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, max_new_tokens=tokens, **options)


def official(
    model: Any, inputs: dict[str, Tensor], alpha: float, threshold: float, phi: str, tokens: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """One forward of the official code at batch 1 (memvr.py:88-90, 206-249), the probe on every token included; and where it fired.

    Args:
        tokens: already there: the visual tokens of an earlier forward, for a step without an image in it.
    """
    text, config = model.model.language_model, model.config
    embeddings = text.embed_tokens(inputs["input_ids"])
    where = inputs["input_ids"][0] == IMAGE
    if where.any():
        seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        tokens = model.model.multi_modal_projector(seen[config.vision_feature_layer][:, 1:])[0]
        embeddings[0, where] = tokens
    assert tokens is not None
    L = embeddings.shape[1]
    positions = torch.arange(L)[None]
    rotary = text.rotary_emb(embeddings, positions)
    mask = torch.full((1, 1, L, L), -torch.inf, dtype=embeddings.dtype).triu(1)
    h, inject, fired = embeddings, False, []
    for i, layer in enumerate(text.layers):
        attended, _ = layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)
        h = h + attended
        x = layer.post_attention_layernorm(h)
        y = layer.mlp(x)
        if inject:
            scale = tokens.abs().mean()
            keys = tokens * (layer.mlp.up_proj.weight.abs().mean() / scale)
            values = tokens * (layer.mlp.down_proj.weight.abs().mean() / scale)
            scores = x @ keys.T
            found = (F.silu(scores) if phi == "silu" else scores) @ values
            found = found * (y.abs().mean() / found.abs().mean())
            y = (1 - alpha) * y + alpha * found
            inject = False
        h = h + y
        logits = model.lm_head(text.norm(h))[0, -1]
        p = logits.topk(10).values.softmax(0)
        entropy = -(p * p.log()).sum() / math.log(10)
        if entropy > threshold and not fired and LOOKS[0] < i < LOOKS[1]:
            fired.append(i + 1)
            inject = True
    return model.lm_head(text.norm(h)), fired


@pytest.mark.parametrize("phi", ["identity", "silu"])
def test_the_official_arithmetic(model: Any, phi: str) -> None:
    """Over prompts that fire in the first layer looked at, in a later one, and in none."""
    layers: set[int] = set()
    for seed in range(8):
        torch.manual_seed(seed)
        inputs = prompt(5)
        for threshold in (0.6, 0.8, 0.97):
            with torch.no_grad():
                wanted, fired = official(model, inputs, 0.3, threshold, phi)
                with visual_retracing(model, alpha=0.3, threshold=threshold, layers=LOOKS, phi=phi):
                    found = model(**inputs).logits
            assert_same(found, wanted)
            layers.add(fired[0] if fired else 0)
    assert len(layers) >= 3
    assert {0, 3} <= layers


@torch.no_grad()
def test_decoding_is_the_official_code_step_by_step(model: Any) -> None:
    """Every step of a greedy generation is probed anew, and changed by one number for its own token."""
    torch.manual_seed(1)
    inputs = prompt(4)
    settings = {"alpha": 0.4, "threshold": 0.5, "layers": LOOKS}
    with visual_retracing(model, **settings):
        out = greedy(model, inputs, 6)
        first = model(**inputs, use_cache=True)
        cache, logits = first.past_key_values, [first.logits[:, -1]]
        for step in range(1, len(out.logits)):
            token = out.sequences[:, inputs["input_ids"].shape[1] + step - 1, None]
            mask = torch.ones(1, inputs["input_ids"].shape[1] + step, dtype=torch.long)
            logits.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1])
    assert_same(torch.stack(logits), torch.stack(out.logits))
    wanted, fired = official(model, inputs, 0.4, 0.5, "identity")
    assert fired
    assert_same(out.logits[0], wanted[:, -1])
    plain = greedy(model, inputs, 6)
    assert any(not torch.equal(a, b) for a, b in zip(plain.logits[1:], out.logits[1:], strict=False))


@torch.no_grad()
def test_a_batch_is_its_samples_alone(model: Any) -> None:
    torch.manual_seed(2)
    inputs = prompt(3, 7, 5)
    settings = {"alpha": 0.4, "threshold": 0.55, "layers": LOOKS}
    with visual_retracing(model, **settings):
        together = greedy(model, inputs, 4)
        for i in range(3):
            real = inputs["attention_mask"][i].bool()
            alone = {"input_ids": inputs["input_ids"][i, real][None], "pixel_values": inputs["pixel_values"][i, None]}
            one = greedy(model, alone | {"attention_mask": torch.ones_like(alone["input_ids"])}, 4)
            for a, b in zip(one.logits, together.logits, strict=False):
                torch.testing.assert_close(a[0], b[i])


@torch.no_grad()
@pytest.mark.parametrize("phi", ["identity", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_the_model_alone(model: Any, phi: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = prompt(5)
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    rounded = copy.deepcopy(model).to(dtype)
    errors = []
    for settings in (None, {"alpha": 0.3, "threshold": 0.0, "layers": LOOKS, "phi": phi}):
        logits = []
        for m, given in ((model, inputs), (rounded, half)):
            with contextlib.nullcontext() if settings is None else visual_retracing(m, **settings):
                logits.append(m(**given).logits.double())
        errors.append((logits[1] - logits[0]).norm())
    assert errors[1] <= 2 * errors[0]


@torch.no_grad()
def test_beams_keep_their_image(model: Any) -> None:
    torch.manual_seed(3)
    inputs = prompt(3, 4)
    with visual_retracing(model, alpha=0.4, threshold=0.1, layers=LOOKS):
        both = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        one = model.generate(**{n: t[1:] for n, t in inputs.items()}, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(both[1, : one.shape[1]], one[0])


@torch.no_grad()
def test_samples_without_an_image_and_images_of_zeros_are_left_alone(model: Any) -> None:
    torch.manual_seed(4)
    inputs = prompt(3, 6)
    with_image = inputs["input_ids"][:1]
    mixed = {
        "input_ids": torch.cat([with_image, torch.full_like(with_image, 5)]),
        "pixel_values": inputs["pixel_values"][:1],
    }
    wanted = model(**mixed).logits
    settings = {"alpha": 0.4, "threshold": 0.0, "layers": LOOKS}
    with visual_retracing(model, **settings):
        found = model(**mixed).logits
        assert not torch.allclose(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])
        text = prompt(5, images=False)
        inside = model(**text).logits  # and the last prompt's image is forgotten
    assert torch.equal(inside, model(**text).logits)
    zero = model.model.multi_modal_projector.register_forward_hook(lambda *a: torch.zeros_like(a[-1]))
    try:
        wanted = model(**inputs).logits
        with visual_retracing(model, **settings):
            assert torch.equal(model(**inputs).logits, wanted)
    finally:
        zero.remove()


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_it_leaves_no_trace(model: Any) -> None:
    torch.manual_seed(5)
    inputs = prompt(4)
    before, count, keys = model(**inputs).logits, hooks(model), list(model.state_dict())
    with contextlib.suppress(ZeroDivisionError), visual_retracing(model, threshold=0.0, layers=LOOKS):
        assert not torch.equal(model(**inputs).logits, before)
        raise ZeroDivisionError
    assert torch.equal(model(**inputs).logits, before)
    assert hooks(model) == count
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_another_thread_is_not_in_the_block(model: Any) -> None:
    torch.manual_seed(6)
    inputs = prompt(4)
    plain, found = model(**inputs).logits, []

    @torch.no_grad()
    def elsewhere() -> None:
        found.append(model(**inputs).logits)

    with visual_retracing(model, threshold=0.0, layers=LOOKS):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        inside = model(**inputs).logits
    assert torch.equal(found[0], plain)
    assert not torch.equal(inside, plain)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"alpha": 1.5}, ValueError, "alpha: wanted a share"),
        ({"phi": "relu"}, ValueError, "phi: wanted one of identity, silu"),
        ({"layers": (5, 5)}, ValueError, "layers: wanted 0 <= start < end"),
        ({"layers": (7, 16)}, ValueError, "a layer strictly between start and end"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "LlavaForConditionalGeneration, got Linear"),
    ],
)
def test_errors(model: Any, change: dict[str, Any], error: type[Exception], said: str) -> None:
    arguments = {"model": model, "layers": LOOKS} | change
    with pytest.raises(error, match=said), visual_retracing(arguments.pop("model"), **arguments):
        pass


def test_what_is_refused_inside(model: Any) -> None:
    with visual_retracing(model, layers=LOOKS):
        with pytest.raises(RuntimeError, match="one block at a time"), visual_retracing(model, layers=LOOKS):
            pass
        with pytest.raises(RuntimeError, match="records gradients"):
            model(**prompt(3))
        with torch.no_grad(), pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 32).double())
