"""ADEM-VL in generate(): the official formulas token by token, for every way to search; prompts come back as given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from memvp_kernels import MemVPConfig
from tests.models.relatives.adem import CONFIG, PREFIXED, batch, images, official_forward, rows, wrapped
from tests.models.tiny import language_model

PICTURES, LENGTHS, NEW = images(True, False, True), (6, 4, 5), 4


def _generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(**inputs, **defaults | options)


def _one(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """Sample i alone, without padding."""
    ids = rows(inputs)[i][None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_features": inputs["image_features"][i : i + 1],
    }


@pytest.mark.parametrize(("family", "config"), [("llama", CONFIG), ("llama", PREFIXED), ("gemma3", PREFIXED)])
def test_greedy_is_the_official_formulas_token_by_token(family: str, config: MemVPConfig) -> None:
    model, base = wrapped(family, config).double(), language_model(family)
    inputs = batch(PICTURES, LENGTHS, left=True)
    got = _generate(model, inputs, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(got.sequences[:, : max(LENGTHS)], inputs["input_ids"])
    grown, logits = rows(inputs), torch.stack(got.logits, dim=1)
    for step in range(NEW):
        with torch.no_grad():
            wanted, _ = official_forward(base, model, grown, PICTURES)
        for i, row in enumerate(wanted):
            torch.testing.assert_close(logits[i, step], row[-1].float())  # generate() keeps logits in float32
            allowed = row[-1].clone()
            allowed[model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
            grown[i] = torch.cat([grown[i], allowed.argmax().view(1)])
    for i, row in enumerate(grown):
        assert torch.equal(got.sequences[i, -len(row) :], row)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beams_are_the_one_by_one_runs(family: str) -> None:
    model, inputs = wrapped(family, PREFIXED), batch(PICTURES, LENGTHS, left=True)
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    together = _generate(model, inputs, **options)
    assert torch.equal(together.sequences[:, : max(LENGTHS)], inputs["input_ids"].repeat_interleave(2, 0))
    for i in range(3):
        alone = _generate(model, _one(inputs, i), **options)
        assert torch.equal(together.sequences[2 * i : 2 * i + 2, -NEW:], alone.sequences[:, -NEW:])
        torch.testing.assert_close(together.sequences_scores[2 * i : 2 * i + 2], alone.sequences_scores)


def test_sampled_sequences_read_their_samples_image() -> None:
    model, inputs = wrapped(config=PREFIXED), batch(PICTURES, LENGTHS, left=True)
    got = _generate(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(got, _generate(model, inputs).repeat_interleave(2, 0))
    others = batch(images(True, False, True, seed=9), LENGTHS, left=True)
    logits = [_generate(model, i, return_dict_in_generate=True, output_logits=True).logits[0] for i in (inputs, others)]
    assert ((logits[0] - logits[1]).abs().amax(-1) > 1e-2).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"past_key_values": "static"},
        {"use_cache": False},
        {
            "max_new_tokens": None,
            "min_new_tokens": None,
            "max_length": max(LENGTHS) + NEW,
            "min_length": max(LENGTHS) + NEW,
        },
        {"generation_config": GenerationConfig(max_length=max(LENGTHS) + NEW, min_length=max(LENGTHS) + NEW)},
        {"attention_mask": None},
        {"position_ids": "given"},
    ],
    ids=["static", "a static cache", "no cache", "lengths", "configured lengths", "inferred mask", "positions"],
)
def test_ways_to_say_the_same(options: dict[str, Any]) -> None:
    model, inputs = wrapped(config=PREFIXED), batch(PICTURES, LENGTHS, left=True)
    wanted = _generate(model, inputs)
    if "past_key_values" in options:  # room for the beginning too
        options = {"past_key_values": StaticCache(config=model.config, max_cache_len=max(LENGTHS) + 4 + NEW)}
    if "position_ids" in options:
        options = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    if "generation_config" in options:
        options |= {"max_new_tokens": None, "min_new_tokens": None}
    assert torch.equal(_generate(model, inputs | {k: v for k, v in options.items() if k in inputs}, **{
        k: v for k, v in options.items() if k not in inputs
    }), wanted)  # fmt: skip


def test_positional_prompts_and_kept_cores() -> None:
    model, inputs = wrapped(config=PREFIXED), batch(PICTURES, LENGTHS, left=True)
    wanted = _generate(model, inputs)
    pictures, ids = inputs.pop("image_features"), inputs.pop("input_ids")
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **inputs}
    assert torch.equal(model.generate(ids, image_features=pictures, **options), wanted)
    with torch.no_grad():
        core = model.encode_images(pictures)
    assert torch.equal(model.generate(ids, visual_core=core, **options), wanted)
    index = torch.tensor([2, 2, 0])
    chosen = model.generate(ids, visual_core=core, visual_index=index, **options)
    assert torch.equal(chosen, model.generate(ids, image_features=[pictures[i] for i in (2, 2, 0)], **options))


def test_a_conversation_goes_on_from_its_cache() -> None:
    model, inputs = wrapped(config=PREFIXED).double(), batch(PICTURES, LENGTHS, left=True)
    first = _generate(model, inputs, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[11, 12]] * 3)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 2, dtype=torch.long)], dim=1)
    longer = inputs | {"input_ids": more, "attention_mask": mask}
    got = _generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(got, _generate(model, longer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "itself"}, "assistant_model: "),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: candidates are looked up"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size: a prompt in chunks"),
        ({"inputs_embeds": torch.zeros(3, 6, 32)}, "inputs_embeds: wanted input_ids alone"),
    ],
)
def test_ways_that_read_the_prompt_from_its_ids_are_refused(options: dict[str, Any], message: str) -> None:
    model = wrapped()
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        _generate(model, batch(PICTURES, LENGTHS, left=True), **options)


def test_disabled_it_is_the_language_model() -> None:
    model, inputs = wrapped(config=PREFIXED), batch(PICTURES, LENGTHS, left=True)
    text = {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    wanted = _generate(language_model(), text)
    with model.disable_memory():
        assert torch.equal(_generate(model, inputs), wanted)
    assert not torch.equal(_generate(model, inputs), wanted)
