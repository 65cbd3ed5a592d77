"""A tiny language model that learns to answer from text alone, before it ever sees an image, and is then frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tiny_vqa.text import Question, Vocabulary, batch

__all__ = ["build", "teach"]


def build(
    vocabulary: Vocabulary, *, width: int, layers: int, window: int | None = None, **settings: object
) -> PreTrainedModel:
    """An untrained LLaMA; or with a window a Qwen2, in whose first layer a word sees only that many words back.

    Args:
        vocabulary: what it reads and writes.
        width: of its hidden states; of the FFNs' hidden, twice as much.
        layers: how many.
        window: of the first layer; None: every word sees all before it.
        **settings: further ones of the configuration.
    """
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": vocabulary.pad,
        "eos_token_id": vocabulary.end,
        "bos_token_id": None,
        **settings,
    }
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**shape))
    kinds = ["sliding_attention"] + ["full_attention"] * (layers - 1)
    return Qwen2ForCausalLM(Qwen2Config(**shape, use_sliding_window=True, sliding_window=window, layer_types=kinds))


def teach(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    lesson: Callable[[float], list[Question]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    noise: float = 0.0,
) -> list[float]:
    """Train on questions whose prompt describes in words what they are about.

    The very first attention comes before any FFN, and what a language model has learnt to read with it, no memory can
    say. So either the described thing is spelled out, ``s e v e n``, and has to be put together first; or the first
    layer's attention has a window.

    Args:
        model: to be trained.
        vocabulary: its words.
        lesson: the questions of one step; it is given how far the training is, 0 to 1.
        steps: how many.
        learning_rate: the highest.
        noise: on the embeddings, in their root mean square (as in NEFTune): what is shown in place of words will be near
            those of words at best.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    embeddings = model.get_input_embeddings()

    def disturb(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + noise * output.detach().square().mean().sqrt() * torch.randn_like(output)

    handle = embeddings.register_forward_hook(disturb) if noise else None
    losses: list[float] = []
    bar = tqdm(range(steps), desc="questions about text", unit="step", mininterval=1)
    for step in bar:
        loss = model(**batch(vocabulary, lesson(step / steps))._asdict()).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    if handle is not None:
        handle.remove()
    return losses
