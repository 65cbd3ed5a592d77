"""What tools ask of a model: a MemVPModel answers as its language model, by a list, and nothing beyond it forgets the image."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from memvp_kernels import MemVPModel
from tests.models.tiny import (
    ENCODER_DECODERS,
    KINDS,
    VOCABULARY,
    features,
    language_model,
    tokens,
    with_memory,
)

ANSWERED = {
    # as the language model
    "can_generate", "compute_transition_scores", "prepare_decoder_input_ids_from_labels", "_supports_logits_to_keep",
    "loss_type", "warnings_issued", "add_model_tags", "model_tags", "accepts_loss_kwargs",
    "enable_input_require_grads", "disable_input_require_grads", "supports_gradient_checkpointing",
    "is_gradient_checkpointing", "is_activation_checkpointing",
    "get_input_embeddings", "set_input_embeddings", "get_output_embeddings", "set_output_embeddings",
    "resize_token_embeddings", "tie_weights",
    "config", "generation_config", "dtype", "name_or_path", "main_input_name", "input_modalities", "output_modalities",
    "hf_device_map", "hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit",
    "set_attn_implementation", "_no_split_modules", "_skip_keys_device_placement", "_keys_to_ignore_on_save",
    "is_distributed_loading_by_transformers", "set_requires_gradient_sync",
    "set_requires_all_reduce", "tp_size", "_tp_size",
    # in a way of its own
    "base_model", "device", "generate", "generate_batch", "num_parameters", "get_memory_footprint",
    "save_pretrained", "from_pretrained", "push_to_hub",
    "activation_checkpointing_enable", "activation_checkpointing_disable",
    "gradient_checkpointing_enable", "gradient_checkpointing_disable",
}  # fmt: skip


def _answers(model: nn.Module, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hasattr(model, name)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_list_is_all_that_it_answers(family: str) -> None:
    model = with_memory(language_model(family))
    base = model.language_model
    of_the_base = {name for name in dir(base) if not hasattr(nn.Module(), name) and not name.startswith("__")}
    answered = {name for name in of_the_base if _answers(model, name)}
    assert answered <= ANSWERED
    assert answered == {name for name in ANSWERED if _answers(base, name) and name in of_the_base}
    for name in (
        "model",
        "lm_head",
        "encoder",
        "decoder",
        "get_encoder",
        "get_decoder",
        "prepare_inputs_for_generation",
    ):
        with pytest.raises(AttributeError, match=rf"'MemVPModel' object has no attribute '{name}'"):
            getattr(model, name)


@pytest.mark.parametrize("sharded", [False, True])
def test_dynamo_sees_whether_the_base_is_sharded(sharded: bool) -> None:
    """It looks without asking descriptors."""
    base = language_model("llama")
    if sharded:  # as fully_shard leaves it
        base._is_fsdp_managed_module = base._fsdp_use_orig_params = True  # type: ignore[assignment]
    model = with_memory(base)
    for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        assert inspect.getattr_static(model, name, False) is sharded


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_answers_are_the_language_model_s(family: str, lora: bool) -> None:
    base = language_model(family)
    wrapped: Any = base
    if lora:
        peft = pytest.importorskip("peft")
        names = ["q"] if "t5" in family else ["q_proj"]
        wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=names))
    model = with_memory(wrapped)
    for name in ("dtype", "loss_type", "main_input_name", "config", "generation_config", "_no_split_modules"):
        assert getattr(model, name) == getattr(base, name), name
    assert model.can_generate()
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(p.numel() for p in model.memory.parameters())
    kept = wrapped.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == kept + own
    assert model.get_memory_footprint() == base.get_memory_footprint() + 4 * own
    chosen = tf.GenerationConfig(max_new_tokens=2, min_new_tokens=2, pad_token_id=0, decoder_start_token_id=2)
    model.generation_config = chosen
    assert base.generation_config is chosen and model.generation_config is chosen
    grown = model.generate(tokens(1), image_features=features(4)).shape[1]
    assert grown == (3 if family in ENCODER_DECODERS else 7)


@pytest.mark.parametrize("family", KINDS)
def test_more_tokens(family: str) -> None:
    """The base stays frozen, the old tokens' logits stay, and a new token can be asked about an image."""
    model = with_memory(language_model(family))
    inputs: dict[str, Any] = {"input_ids": tokens(1), "labels": tokens(1), "image_features": features(4)}
    before = model(**inputs).logits
    model.resize_token_embeddings(VOCABULARY + 3)
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert model.config.get_text_config().vocab_size == VOCABULARY + 3
    torch.testing.assert_close(model(**inputs).logits[..., :VOCABULARY], before)
    new = tokens(1).index_fill(1, torch.tensor([2]), VOCABULARY + 1)
    one, other = (model(new, labels=new, image_features=features(4, seed=s)).logits for s in (3, 44))
    assert not torch.equal(one, other)
    assert model.unload().get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", KINDS)
def test_the_base_model_reads_the_image(family: str) -> None:
    """What TRL runs below a causal model's head; an encoder-decoder of transformers is its own base model."""
    model = with_memory(language_model(family))
    ids = tokens(2)
    inputs: dict[str, Any] = {"decoder_input_ids": ids} if family in ENCODER_DECODERS else {}
    for images in (features(4, 0), features(4, 9, seed=9)):
        wanted = model(ids, image_features=images, output_hidden_states=True, **inputs)
        got = model.base_model(ids, image_features=images, **inputs)
        hidden = got[0] if family in ENCODER_DECODERS and family != "bart" else got.last_hidden_state
        last = (
            wanted.logits
            if hidden.shape[-1] == VOCABULARY
            else (wanted.get("hidden_states") or wanted.decoder_hidden_states)[-1]
        )
        torch.testing.assert_close(hidden, last)


def test_what_has_no_image_is_refused() -> None:
    model = with_memory(language_model())
    with pytest.raises(NotImplementedError, match="no image per request"):
        model.generate_batch([[1, 2]])
    with pytest.raises(NotImplementedError, match="no image per"):
        model.generate(tokens(1), image_features=features(4), max_new_tokens=2, cache_implementation="paged")
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NotImplementedError, match="prompt"):
        _ = with_memory(peft.get_peft_model(language_model(), prompt)).base_model


def test_options_of_save_pretrained(tmp_path: Path) -> None:
    """accelerate's way to save, a gathered state_dict of the whole model, and what cannot be."""
    model = with_memory(language_model())
    moved = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"save_function": torch.save, "max_shard_size": "1GB", "safe_serialization": True}
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path, is_main_process=True, state_dict=moved, **options)
    again = MemVPModel.from_pretrained(language_model(), tmp_path)
    assert torch.equal(again.key_position, model.key_position + 1)
    with pytest.raises(ValueError, match="safetensors alone"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TypeError, match=r"unknown options \['varian'\]"):
        model.save_pretrained(tmp_path, varian="x")
    with pytest.raises(ValueError, match="wanted that of the MemVPModel, got one without key_position, projector"):
        model.save_pretrained(tmp_path, state_dict=model.language_model.state_dict())


class _Hub:
    """huggingface_hub's API, as far as an upload asks it."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, token: Any = None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, options))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> None:
        self.calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_the_hub_gets_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    monkeypatch.setattr(_Hub, "calls", [])
    files = ["memvp_config.json", "memvp_model.safetensors"]
    model = with_memory(language_model())
    model.push_to_hub("adapter", private=True, token="t")
    asked = ("adapter", {"private": True, "exist_ok": True})
    assert _Hub.calls == [("token", "t"), asked, ("me/adapter", files)]
    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert _Hub.calls[-1] == ("me/named", files)
