"""Training around the memory: activation checkpointing, autocast, accelerate, recompute, and two backends that agree."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels.models.patching import feed_forward
from memvp_kernels.shared_memory import fused_ffn_shared
from tests.models.tiny import (
    CONFIG,
    IMAGES,
    KINDS,
    features,
    inputs,
    language_model,
    oracle,
    shuffled,
    tokens,
    with_memory,
    wrapped,
)


def _step(model: Any, **images: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**(images or {"image_features": IMAGES}), **inputs()).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", KINDS)
def test_checkpointing_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of every kind is on, so the second run must also draw what the first drew."""
    model = wrapped(family, dataclasses.replace(CONFIG, dropout=0.5)).train()
    torch.manual_seed(3)
    plain = _step(model)
    runs: list[int] = []
    monkeypatch.setattr(
        feed_forward, "fused_ffn_shared", lambda *a, **k: (runs.append(1), fused_ffn_shared(*a, **k))[1]
    )
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    again = _step(model)
    assert len(runs) == 2 * len(model.memory_ffns()), "every FFN ran twice"
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    model.gradient_checkpointing_disable()
    torch.manual_seed(3)
    torch.testing.assert_close(_step(model), plain, rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused() -> None:
    model = wrapped().train()
    with pytest.raises(ValueError, match="use_reentrant=True walks the projector's graph once per layer"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        _step(model)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_recompute_changes_nothing(family: str) -> None:
    torch.testing.assert_close(_step(wrapped(family, recompute=True)), _step(wrapped(family)), rtol=0, atol=0)


@pytest.mark.parametrize(("family", "opaque"), [("llama", False), ("llama", True), ("t5-gated", False), ("bart", True)])
def test_autocast(family: str, opaque: bool) -> None:
    """bfloat16 products over float32 weights: at most twice the error of plain PyTorch under autocast, median of five models.

    In norm and at the worst element.
    """
    ratios = []
    for seed in range(5):
        model = wrapped(family, seed=seed)
        if opaque:
            for _, ffn in model.memory_ffns():
                linears = [m for m in ffn._modules.values() if isinstance(m, torch.nn.Linear)]
                linears[0].register_forward_hook(lambda *args: None)
        plain = language_model(family, seed)
        _, exact_gradients = oracle(plain, model, IMAGES, **inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, gradients = _step(model)
            _, their_gradients = oracle(plain, model, IMAGES, dtype=torch.float32, factored=True, **inputs())
        parts = {id(p): n for n, p in model.named_parameters()}
        order = [model.key_position, model.value_position, *model.projector.parameters()]
        mine = [gradients[parts[id(p)]] for p in order]
        assert all(g.dtype == torch.float32 for g in mine)
        ratios.append(
            [
                (size((m - e).abs()) / size((t - e).abs())).item()
                for m, t, e in zip(mine, their_gradients, exact_gradients, strict=True)
                for size in (torch.linalg.vector_norm, torch.amax)
            ]
        )
    assert all(statistics.median(column) <= 2 for column in zip(*ratios, strict=True)), ratios


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = wrapped().train()
    model = copy.deepcopy(plain)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss = prepared(image_features=IMAGES, **inputs()).loss
    accelerator.backward(loss)
    optimizer.step()
    wanted = _step(plain)
    torch.testing.assert_close(loss.detach(), wanted[0])
    torch.testing.assert_close(
        accelerator.unwrap_model(prepared).key_position.detach(),
        (plain.key_position - 0.1 * wanted[1]["memory.key_position"]).detach(),
    )


_TRAIN = """
import json, sys, torch
from tests.models.test_training import train
from tests.triton.interpreter import repair

repair()
torch.set_num_threads(1)
print(json.dumps([train("triton", family) for family in sys.argv[1:]]))
"""


def train(
    backend: str, family: str, dtype: torch.dtype = torch.float32, order: int | None = None
) -> tuple[list[float], dict[str, list[float]]]:
    """Eight steps; the losses, and the adapter afterwards."""
    config = CONFIG if family == "llama" else dataclasses.replace(CONFIG, layers=(0,))
    base = language_model(family)
    model = with_memory(base if order is None else shuffled(base, order), config, backend=backend).to(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for step in range(8):
        ids = tokens(3, 5, seed=step % 2)
        loss = model(input_ids=ids, labels=ids, image_features=features(4, 0, 10, seed=step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: tensor.flatten().tolist() for name, tensor in model.adapter_state_dict().items()}


def test_eight_steps_agree_between_backends() -> None:
    """Interpreted Triton kernels and PyTorch train alike, gated and plain.

    Steps carry rounding along: against float64, the kernels stray at most twice as far as PyTorch does over a few orders of the
    FFN's sums.
    """
    pytest.importorskip("triton")
    root, families = Path(__file__).parents[2], ("llama", "t5")
    run = subprocess.run(
        [sys.executable, "-c", _TRAIN, *families],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for family, (losses, state) in zip(families, json.loads(run.stdout.splitlines()[-1]), strict=True):
        exact_losses, exact = train("torch", family, torch.float64)
        assert sum(exact_losses[-2:]) < sum(exact_losses[:2]), f"{family} does not learn: {exact_losses}"
        orders = [train("torch", family, order=order) for order in (None, 0, 1, 2)]
        _assert_strays_little(losses, exact_losses, [theirs for theirs, _ in orders], f"{family} losses")
        for name, wanted in exact.items():
            _assert_strays_little(state[name], wanted, [theirs[name] for _, theirs in orders], f"{family} {name}")


def _assert_strays_little(mine: list[float], exact: list[float], theirs: list[list[float]], what: str) -> None:
    wanted = torch.tensor(exact, dtype=torch.float64)
    away = [(torch.tensor(run, dtype=torch.float64) - wanted).norm().item() for run in (mine, *theirs)]
    assert away[0] <= 2 * max(away[1:]), f"{what}: {away[0]:.2e} from float64, PyTorch {max(away[1:]):.2e}"
