"""A tiny LLaMA that learns to answer from text alone, before it ever sees an image, and is then frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_vqa.text import Question, Vocabulary, batch

__all__ = ["build", "teach"]


def build(vocabulary: Vocabulary, *, width: int, layers: int, **settings: object) -> LlamaForCausalLM:
    """An untrained model.

    Args:
        vocabulary: what it reads and writes.
        width: of its hidden states; of the FFNs' hidden, twice as much.
        layers: how many.
        **settings: further ones of LlamaConfig.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=vocabulary.pad,
            eos_token_id=vocabulary.end,
            bos_token_id=None,
            **settings,
        )
    )


def teach(
    model: LlamaForCausalLM,
    vocabulary: Vocabulary,
    lesson: Callable[[float], list[Question]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Train on questions whose prompt describes in words what they are about.

    The described thing is spelled out, ``s e v e n``, because then the model has to put it together in its first layers
    and use it in later ones, and a memory in the FFNs can take the first part over. What is one word is copied from its
    embedding by the very first attention, before any FFN.

    Args:
        model: to be trained.
        vocabulary: its words.
        lesson: the questions of one step; it is given how far the training is, 0 to 1.
        steps: how many.
        learning_rate: the highest.

    Returns:
        The loss of each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
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
    return losses
