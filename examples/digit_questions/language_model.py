"""A tiny LLaMA that learns arithmetic from text, before it ever sees an image, and is then frozen."""

from __future__ import annotations

import random

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from digit_questions.questions import Vocabulary, ask, batch, spelled

__all__ = ["build", "teach_arithmetic"]

WIDTH, LAYERS = 128, 4


def build(vocabulary: Vocabulary) -> LlamaForCausalLM:
    """An untrained model of 0.7M parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=vocabulary.pad,
            eos_token_id=vocabulary.end,
            bos_token_id=None,
        )
    )


def teach_arithmetic(
    model: LlamaForCausalLM, vocabulary: Vocabulary, *, steps: int, rows: int = 64, seed: int = 0
) -> list[float]:
    """Train on questions about a digit that the text spells out: ``this is s e v e n . add three to it . answer ten``.

    Spelled out, because then the model has to put the digit together in its first layers and use it in later ones, and a
    memory in the FFNs can take the first part over. A digit that is one word is copied from its embedding by the very
    first attention, before any FFN.

    Returns:
        The loss of each step.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="arithmetic, from text", unit="step", mininterval=1)
    for _ in bar:
        digits = [rng.randrange(10) for _ in range(rows)]
        questions = batch(vocabulary, [ask(rng, digit, spelled(digit)) for digit in digits])
        loss = model(**questions._asdict()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return losses
