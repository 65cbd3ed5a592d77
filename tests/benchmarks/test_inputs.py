"""Inputs are real, all different, never zeros, and the same in every run."""

from __future__ import annotations

import pytest
import torch
from harness import inputs

CPU = torch.device("cpu")


def test_features_are_patches_of_photographs() -> None:
    found = inputs.image_features(16, 256, 1024, device=CPU, dtype=torch.float32)
    assert found.shape == (16, 256, 1024)
    assert torch.equal(found, inputs.image_features(16, 256, 1024, device=CPU, dtype=torch.float32))
    assert len({tuple(image[0, :64].tolist()) for image in found}) == 16  # sixteen different images
    assert found.mean().abs() < 0.01
    assert found.std() == pytest.approx(1, rel=0.01)
    neighbours = torch.nn.functional.cosine_similarity(found[:, :, :-1].flatten(1), found[:, :, 1:].flatten(1))
    assert neighbours.min() > 0.7  # photographs are smooth; noise would be near 0


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (17, 64), (576, 1500)])
def test_any_number_and_width_of_patches(tokens: int, width: int) -> None:
    found = inputs.image_features(2, tokens, width, device=CPU, dtype=torch.bfloat16)
    assert found.shape == (2, tokens, width)
    assert found.dtype == torch.bfloat16
    assert found.float().abs().mean() > 0.1


def test_without_scikit_learn_the_images_have_a_photographs_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "photographs", lambda: ())
    found = inputs.image_features(4, 16, 1024, device=CPU, dtype=torch.float32)
    neighbours = torch.nn.functional.cosine_similarity(found[:, :, :-1].flatten(1), found[:, :, 1:].flatten(1))
    assert neighbours.min() > 0.5
    assert "fractal" in inputs.source()


def test_tokens_are_english() -> None:
    found = inputs.text_tokens(8, 200, 32000, device=CPU)
    assert found.shape == (8, 200)
    assert found.min() >= 0
    assert found.max() < 32000
    counts = torch.bincount(found.flatten())
    assert counts.max() > 20 * counts[counts > 0].float().median()  # "the" and "of" against all others
    assert not torch.equal(found, inputs.text_tokens(8, 200, 32000, device=CPU, offset=1600))
    assert inputs.text_tokens(3, 100, 50, device=CPU).max() < 50


def test_hidden_states_are_normalised_and_varied() -> None:
    found = inputs.hidden_states(4, 64, 128, device=CPU, dtype=torch.float32)
    assert found.pow(2).mean(-1) == pytest.approx(torch.ones(4, 64).numpy(), rel=1e-4)
    assert len({tuple(row[:8].tolist()) for row in found.flatten(0, 1)}) > 200  # text repeats itself
