"""Activation checkpointing whose kind was left to PyTorch's default, which is the reentrant one: it trains as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import MemVPModel
from tests.models.tiny import KINDS, features, language_model, tokens, with_memory


def _gradients(model: MemVPModel) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model.train()(input_ids=tokens(), labels=tokens(), image_features=features(4, 0, 10)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _enable(base: Any, how: str) -> None:
    if how == "prepare_model_for_kbit_training":
        peft = pytest.importorskip("peft")
        base.is_loaded_in_4bit = True
        peft.prepare_model_for_kbit_training(base)
        del base.is_loaded_in_4bit
    else:
        getattr(base, how)({})


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("when", ["before wrapping", "after"])
@pytest.mark.parametrize("how", ["gradient_checkpointing_enable", "prepare_model_for_kbit_training"])
@pytest.mark.parametrize("family", KINDS)
def test_the_default_kind_trains(family: str, how: str, when: str) -> None:
    wanted = _gradients(with_memory(language_model(family)))
    base = language_model(family)
    if when == "before wrapping":
        _enable(base, how)
    model = with_memory(base)
    if when == "after":
        _enable(base, how)
        model.memory.requires_grad_(True)
    got = _gradients(model)
    assert any(getattr(m, "gradient_checkpointing", False) for m in base.modules())
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
