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
from memvp_kernels.backends.triton.runtime import launch, tma
from memvp_kernels.hardware import chip_of
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
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_lengths_in_one_bucket_share_a_search(work: collections.Counter[str]) -> None:
    """Each length of text is a shape of its own; what is searched for are the powers of two."""
    chip = chip_of(90)
    x = problem().segments
    for rows in range(65, 129):
        given = torch.empty(rows, 40, dtype=torch.bfloat16)
        tiles.hidden_tile(chip, launch.shape_of(given, 72, 17, x, gated=True, descriptors=True))
    assert work["candidates"] == 1
