"""generate(): caches, beams, returned sequences, sampling and padding, each against runs that use none of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels.backends.torch import memory_rows
from memvp_kernels.models.patching.binding import bound
from tests.models.tiny import ENCODER_DECODERS, features, tokens, wrapped

FAMILIES = ["llama", "qwen3", "gemma2", "t5-gated", "bart"]
NEW = 5


def _generate(model: Any, ids: Tensor, images: Any, **options: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, image_features=images, **options)


def _greedy_without_cache(model: Any, ids: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sample, the whole sequence run again for every token: the tokens and each step's logits."""
    encoder_decoder = model.config.is_encoder_decoder
    grown = torch.tensor([[model.config.decoder_start_token_id]]) if encoder_decoder else ids
    steps = []
    for _ in range(NEW):
        inputs = {"input_ids": ids, "decoder_input_ids": grown} if encoder_decoder else {"input_ids": grown}
        with torch.no_grad():
            steps.append(model(image_features=[image], **inputs, use_cache=False).logits[0, -1])
        allowed = steps[-1].clone()
        allowed[model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
        grown = torch.cat([grown, allowed.argmax().view(1, 1)], dim=1)
    return grown[0], torch.stack(steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_a_cache_is_greedy_without(family: str) -> None:
    model, ids, images = wrapped(family).double(), tokens(3), features(4, 0, 10)
    got = _generate(model, ids, images, return_dict_in_generate=True, output_logits=True)
    logits = torch.stack(got.logits, dim=1)
    for i in range(3):
        row, steps = _greedy_without_cache(model, ids[i : i + 1], images[i])
        assert torch.equal(got.sequences[i], row)
        torch.testing.assert_close(logits[i], steps.float())  # generate() keeps logits in float32
    others = _generate(model, ids, features(4, 9, 10, seed=9), return_dict_in_generate=True, output_logits=True)
    assert ((others.logits[0] - got.logits[0]).abs().amax(-1) > 1e-2).all(), "the images make no difference"


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_the_one_by_one_runs(family: str) -> None:
    """Each sample reads its own image while beams are expanded, scored and reordered."""
    model, ids, images = wrapped(family), tokens(3), features(4, 0, 10)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    together = _generate(model, ids, images, **options)
    assert together.sequences.shape[0] == 6
    for i in range(3):
        alone = _generate(model, ids[i : i + 1], images[i : i + 1], **options)
        assert torch.equal(together.sequences[2 * i : 2 * i + 2], alone.sequences)
        torch.testing.assert_close(together.sequences_scores[2 * i : 2 * i + 2], alone.sequences_scores)


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bart"])
def test_sampled_sequences_read_their_samples_image(family: str) -> None:
    """With top_k=1 sampling is greedy, so that every returned sequence is known."""
    model, ids, images = wrapped(family), tokens(3), features(4, 0, 10)
    got = _generate(model, ids, images, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(got, _generate(model, ids, images).repeat_interleave(2, 0))
    torch.manual_seed(4)
    first = _generate(model, ids, images, do_sample=True, top_k=0, temperature=2.0)
    torch.manual_seed(4)
    assert torch.equal(first, _generate(model, ids, images, do_sample=True, top_k=0, temperature=2.0))
    assert not torch.equal(first, _generate(model, ids, images, do_sample=True, top_k=0, temperature=2.0))


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5-gated", "bart"])
def test_static_cache(family: str) -> None:
    model, ids, images = wrapped(family), tokens(3), features(4, 0, 10)
    got = _generate(model, ids, images, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, _generate(model, ids, images))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_left_padding(family: str) -> None:
    model, ids, images = wrapped(family), tokens(2, 5), features(4, 10)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    padded[0] = torch.cat([padded[0, 1:], torch.tensor([7])])
    mask = torch.ones_like(padded)
    mask[0, :2] = mask[1, :3] = 0
    together = _generate(model, padded, images, attention_mask=mask)[:, 8:]
    for i, left in enumerate((2, 3)):
        alone = _generate(model, padded[i : i + 1, left:], images[i : i + 1])[:, 8 - left :]
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("family", ["llama", "t5-gated"])
def test_cores_are_kept_and_used_again(family: str) -> None:
    model, images = wrapped(family), features(4, 0, 10)
    with torch.no_grad():
        core = model.encode_images(images)
    assert core.shape == (3, 10, 8) and core.dtype == torch.float32
    ids = tokens(3)
    wanted = _generate(model, ids, images)
    assert torch.equal(_generate(model, ids, None, visual_core=core), wanted)
    several = _generate(model, ids[[0, 0, 2]], None, visual_core=core[:1], visual_index=torch.tensor([0, 0, 0]))
    assert torch.equal(several, _generate(model, ids[[0, 0, 2]], [images[0]] * 3))
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids, visual_core=core).logits
        exact = model(input_ids=ids, labels=ids, image_features=images).logits
    assert torch.equal(logits, exact)


def test_the_image_is_encoded_once_per_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama")
    calls: list[int] = []
    factors = type(model.projector).factors
    monkeypatch.setattr(type(model.projector), "factors", lambda *a: (calls.append(1), factors(*a))[1])
    _generate(model, tokens(2), features(4, 10), num_beams=2)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["llama", "t5-gated", "bart"])
def test_an_index_is_made_where_sequences_are_repeated_and_nowhere_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, decoding takes a batched product per layer; with one, a CPU takes a product per image."""
    grouped: list[int] = []
    made = memory_rows.Grouped.__init__
    monkeypatch.setattr(memory_rows.Grouped, "__init__", lambda *a, **k: (grouped.append(1), made(*a, **k))[1])
    model, ids = wrapped(family), tokens(3)
    seen: list[Tensor | None] = []
    with model.observing(lambda layer, x, y: seen.append(bound().index)):
        _generate(model, ids, features(4, 0, 10))
        assert len(seen) > NEW and not any(index is not None for index in seen)
        assert not grouped
        seen.clear()
        _generate(model, ids, features(4, 0, 10), num_beams=2)
        _generate(model, ids, features(4, 7), visual_index=torch.tensor([1, 0, -1]))
    assert grouped
    given = [index for index in seen if index is not None]
    assert {index.dtype for index in given} == {torch.int32}
    assert {tuple(index.tolist()) for index in given} == {(0, 0, 1, 1, 2, 2), (1, 0, -1)}


@pytest.mark.parametrize("family", ["t5-gated", "bart"])
def test_an_encoder_that_has_run_says_how_many_samples_there_are(family: str) -> None:
    model, ids, images = wrapped(family), tokens(3), features(4, 0, 10)
    core = model.encode_images(images).detach()
    with torch.no_grad():
        encoder = model.language_model.get_encoder()
        states = encoder(input_ids=ids, visual_memory=model.memory(core=core), return_dict=True)
    got = model.generate(
        encoder_outputs=states, visual_core=core, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(got, _generate(model, ids, images))


def test_positional_and_embedded_prompts() -> None:
    model, ids, images = wrapped("llama"), tokens(2), features(4, 10)
    wanted = _generate(model, ids, images)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, image_features=images, attention_mask=mask, **options), wanted)
    embedded = model.language_model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embedded, image_features=images, attention_mask=mask, **options)
    assert torch.equal(got, wanted[:, 5:])


def test_a_typo_is_still_caught() -> None:
    with pytest.raises(ValueError, match="image_feature"):
        wrapped("llama").generate(input_ids=tokens(1), image_feature=features(4), max_new_tokens=1)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_and_decoder_both_read_the_image(family: str) -> None:
    model, ids = wrapped(family), tokens(1)
    seen: list[int] = []
    with model.observing(lambda layer, x, y: seen.append(layer)), torch.no_grad():
        model(input_ids=ids, labels=ids, image_features=features(4))
    assert seen == [0, 1, 2] and len(model.memory_ffns()) == 3
