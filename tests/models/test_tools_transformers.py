"""transformers' own tools over a MemVPModel: pipeline(), Seq2SeqTrainer, NEFTune, special tokens, bases that are offloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from memvp_kernels import MemVPModel
from memvp_kernels.models.patching.vision_adapters import attach_adapters
from tests.models.clip import pixels, vision_model
from tests.models.parallel.processes import Group, free_port, meet
from tests.models.tiny import KINDS, VISION, features, language_model, tokens, with_memory
from tests.models.tools import arguments, fails_before, losses, tokenizer, without_dropout


def _images(form: str) -> dict[str, Any]:
    return {"pixel_values": pixels(1)} if form == "pixel_values" else {"image_features": torch.stack(features(4))}  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["image_features", "pixel_values"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_pipeline(family: str, form: str) -> None:
    model = with_memory(language_model(family), vision_model=vision_model(VISION))
    words, prompt = tokenizer(), "w5 w9 w14"
    ids = words(prompt, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    pipe = tf.pipeline("text-generation", model=model, tokenizer=words)
    for image in (_images(form), {}):
        said = pipe(prompt, return_full_text=False, **options, **image)[0]["generated_text"]
        wanted = model.generate(**ids, pad_token_id=0, **options, **image)
        assert said == words.decode(wanted[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    said = pipe([prompt, prompt], return_full_text=False, batch_size=2, **options, image_features=features(4, 0))
    alone = [pipe(prompt, return_full_text=False, **options, image_features=[i]) for i in features(4, 0)]
    assert [row[0] for row in said] == [row[0] for row in alone]


def _rows() -> Any:
    """Questions, answers and an image each."""
    ids = [tokens(1, 4 + i % 2, seed=i)[0].tolist() for i in range(4)]
    images = [features(2 + i, seed=i)[0] for i in range(4)]
    return [{"input_ids": x, "labels": x[::-1], "image_features": z} for x, z in zip(ids, images, strict=True)]


class _Collator:
    """transformers' collator, and the images beside it."""

    def __init__(self, model: MemVPModel) -> None:
        self.of_text = tf.DataCollatorForSeq2Seq(tokenizer(), model=model)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        text = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
        return {**self.of_text(text), "image_features": [row["image_features"] for row in rows]}


def _arguments(folder: Path, **options: Any) -> Any:
    return arguments(folder, tf.Seq2SeqTrainingArguments, **options)


@pytest.mark.parametrize("family", ["llama", "t5", "t5-gated", "mt5", "bart"])
def test_seq2seq_trainer_predicts_by_generating(family: str, tmp_path: Path) -> None:
    """The arguments' GenerationConfig counts, the collator makes the decoder's inputs, every row reads its own image."""
    base = language_model(family)
    model = with_memory(base)
    start = base.generation_config.decoder_start_token_id
    chosen = tf.GenerationConfig(
        max_new_tokens=3, min_new_tokens=3, pad_token_id=0, eos_token_id=2, decoder_start_token_id=start
    )
    options: dict[str, Any] = {"predict_with_generate": True, "generation_config": chosen, "max_steps": 1}
    options |= {"per_device_eval_batch_size": 4, "label_smoothing_factor": 0.1 if family != "llama" else 0.0}
    trainer = tf.Seq2SeqTrainer(
        model=model,
        args=_arguments(tmp_path, **options),
        train_dataset=_rows(),
        data_collator=_Collator(model),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert model.generation_config.max_new_tokens == 3
    predicted = trainer.predict(_rows())
    batch = _Collator(model)(_rows())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image_features")}
    got = torch.from_numpy(predicted.predictions)
    wanted = model.eval().generate(**inputs)
    assert torch.equal(got[:, : wanted.shape[1]], wanted)
    assert (family in ("llama",)) == ("decoder_input_ids" not in batch)


def test_special_tokens_are_aligned(tmp_path: Path) -> None:
    """Trainer tells the model's configurations of the tokenizer's tokens, so that generation ends where training did."""
    model = with_memory(language_model())
    words = tokenizer(eos_token="w9", pad_token="w8")
    trainer = tf.Trainer(
        model=model,
        args=_arguments(tmp_path, max_steps=1),
        train_dataset=_rows(),
        data_collator=_Collator(model),
        processing_class=words,
    )
    trainer.train()
    assert (model.config.eos_token_id, model.config.pad_token_id) == (9, 8)
    assert 9 in model.language_model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == 8


@pytest.mark.parametrize("family", ["llama", "gemma"])  # transformers' hook reaches no encoder-decoder's embeddings
def test_noisy_embeddings(family: str, tmp_path: Path) -> None:
    """NEFTune's noise is there in training alone, and its hook is gone afterwards."""
    found = {}
    for alpha in (None, 5.0):
        model = with_memory(without_dropout(language_model(family)))
        options: dict[str, Any] = {"neftune_noise_alpha": alpha, "max_steps": 1, "logging_steps": 1}
        trainer = tf.Trainer(
            model=model, args=_arguments(tmp_path, **options), train_dataset=_rows(), data_collator=_Collator(model)
        )
        before = trainer.evaluate(_rows())["eval_loss"]
        trainer.train()
        found[alpha] = (before, losses(trainer)[0])
        assert not model.get_input_embeddings()._forward_hooks
    assert found[None][0] == found[5.0][0]
    assert found[None][1] != found[5.0][1]


def _trained(base: Any, folder: Path | str, rank: int = 0, ranks: int = 1, kind: str = "MemVPTrainer") -> Any:
    """The losses of three steps over all rows, and the adapter afterwards; the folder it was saved in."""
    from memvp_kernels.models.trainer import MemVPTrainer

    cls: Any = MemVPTrainer if kind == "MemVPTrainer" else tf.Trainer
    model = with_memory(base)
    options: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.05}
    if kind == "MemVPTrainer":
        options |= {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    arguments = _arguments(Path(folder), per_device_train_batch_size=4 // ranks, **options)
    trainer = cls(model=model, args=arguments, train_dataset=_rows(), data_collator=_Collator(model))
    trainer.train()
    return losses(trainer), model.adapter_state_dict()


def _assert_alike(got: Any, wanted: Any) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-4)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["Trainer", "MemVPTrainer"])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_trainer_over_an_offloaded_base(family: str, kind: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    base = without_dropout(language_model(family))
    places = {name: "disk" if i else "cpu" for i, (name, _) in enumerate(base.named_children())}
    places |= {"final_logits_bias": "cpu"} if family == "bart" else {}
    accelerate.dispatch_model(base, places, main_device="cpu", offload_dir=str(tmp_path / "weights"), force_hooks=True)
    got = _trained(base, tmp_path / "offloaded", kind=kind)
    _assert_alike(got, _trained(without_dropout(language_model(family)), tmp_path / "plain", kind=kind))


def _sharded(port: int, folder: str, kind: str) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    meet(port)
    base = tf.LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    assert type(next(base.model.layers[0].mlp.parameters())).__name__ == "DTensor"
    return _trained(base, f"{folder}/{kind}", int(os.environ["RANK"]), 2, kind)


@fails_before(transformers="5.23")
@pytest.mark.parametrize("kind", ["Trainer", "MemVPTrainer"])
def test_trainer_over_a_base_that_was_loaded_sharded(apart: Group, kind: str, tmp_path: Path) -> None:
    """transformers shards while it loads, and Trainer then averages what it finds unsharded: LoRA, and the memory."""
    language_model().save_pretrained(tmp_path)
    first, second = apart.run(_sharded, free_port(), str(tmp_path), kind)
    torch.testing.assert_close(first[1], second[1], rtol=0, atol=0)
    _assert_alike(first, _trained(tf.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path / "one", kind=kind))
    if kind == "MemVPTrainer":
        saved = MemVPModel.from_pretrained(language_model(), tmp_path / kind / "checkpoint-3")
        assert torch.equal(saved.key_position, first[1]["key_position"])


OFFLOAD = {
    "cpu_offload": lambda model, folder: accelerate().cpu_offload(model, "cpu"),
    "disk_offload": lambda model, folder: accelerate().disk_offload(model, str(folder), "cpu"),
    "dispatch_model": lambda model, folder: accelerate().dispatch_model(
        model,
        {"language_model": "disk", "memory": "disk", "vision_model": "disk"},
        main_device="cpu",
        offload_dir=str(folder),
        force_hooks=True,
    ),
}


def accelerate() -> Any:
    """Imported when it is needed."""
    return pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("family", "how"),
    [*((f, "cpu_offload") for f in KINDS), *((f, h) for f in ("llama", "t5", "bart") for h in list(OFFLOAD)[1:])],
)
def test_the_whole_model_offloaded(family: str, how: str, tmp_path: Path) -> None:
    """The memory and CLIP's adapters stay where they compute; they train, and are saved."""
    clip = vision_model(VISION)
    for adapter in attach_adapters(clip, hidden_dim=3, dropout=0.0):
        torch.nn.init.normal_(adapter.fc2.weight)
    model = with_memory(without_dropout(language_model(family)), vision_model=clip).train()
    inputs: dict[str, Any] = {"input_ids": tokens(2), "labels": tokens(2), "pixel_values": pixels(2)}
    model(**inputs).loss.backward()
    gradient = model.key_position.grad
    wanted, state = model.eval()(**inputs).logits, model.adapter_state_dict()
    OFFLOAD[how](model, tmp_path / "weights")
    assert next(model.language_model.parameters()).device.type == "meta"
    torch.testing.assert_close(model(**inputs).logits, wanted)
    assert all(torch.equal(model.adapter_state_dict()[name], tensor) for name, tensor in state.items())
    text = model.generate(tokens(2), pixel_values=pixels(2), max_new_tokens=2)
    assert text.shape[0] == 2
    model.zero_grad()
    model.train()(**inputs).loss.backward()
    torch.testing.assert_close(model.key_position.grad, gradient)
    model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_the_whole_model_quantized(family: str) -> None:
    """torchao takes the language model's linear layers and leaves the memory's, which train."""
    quantization = pytest.importorskip("torchao.quantization")
    whole, part = with_memory(language_model(family)), with_memory(language_model(family))
    inputs: dict[str, Any] = {"input_ids": tokens(2), "labels": tokens(2), "image_features": features(4, 0)}
    before = whole(**inputs).logits
    quantization.quantize_(whole, quantization.Int8WeightOnlyConfig())
    quantization.quantize_(part.language_model, quantization.Int8WeightOnlyConfig())
    got = whole(**inputs).logits
    assert torch.equal(got, part(**inputs).logits) and not torch.equal(got, before)
    assert all(type(p) is torch.nn.Parameter for p in whole.memory.parameters())
    whole.train()(**inputs).loss.backward()
    assert whole.projector.fc2.weight.grad is not None
