"""What the host does before a launch it does once for each layout: the second call of the same shapes searches nothing."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import gemm
from memvp_kernels.backends.triton.heuristics import cost_model, tiles
from memvp_kernels.backends.triton.runtime import tma
from memvp_kernels.problem import Problem
from tests.triton.test_backward_needs import FORMS, dy, problem, trainable


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often a layout was judged, a tile or an implementation searched."""
    done: collections.Counter[str] = collections.Counter()

    def count(owner: Any, name: str) -> None:
        known = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done[name] += 1
            return known(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((tma, "_has_tma_layout"), (tiles, "candidates"), (cost_model, "step_cycles")):
        count(owner, name)
    for remembered in (
        tma._mode, tma._fields, tiles.hidden_tile, tiles._hidden_tile, tiles.output_tile, tiles._output_tile, cost_model.choice,
    ):  # fmt: skip
        remembered.cache_clear()
    return done


def step(p: Problem) -> dict[str, Tensor]:
    y, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    return {"y": y, **backend.backward(p, dy(p), pre, scores, trainable(p))}


def elsewhere(p: Problem) -> Problem:
    """The same problem at other addresses."""
    return Problem(**{name: t.clone() if isinstance(t, Tensor) else t for name, t in vars(p).items()})


@pytest.mark.parametrize("form", FORMS)
def test_a_second_call_searches_nothing(form: str, work: collections.Counter[str]) -> None:
    with gemm.override_implementation(None):
        first = problem(form)
        expected = step(first)
        assert work["_has_tma_layout"] > 0
        assert work["candidates"] > 0
        assert work["step_cycles"] > 0
        work.clear()
        found = step(elsewhere(first))
        assert not work
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
