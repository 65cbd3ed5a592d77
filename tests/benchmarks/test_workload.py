"""Inputs are real, all different, never zeros, and the same in every run."""

from __future__ import annotations

import pytest
import torch
import workload


def neighbors(features: torch.Tensor) -> torch.Tensor:
    """How alike the patches of neighboring pixels are: photographs are smooth, noise would be near 0."""
    return torch.nn.functional.cosine_similarity(features[:, :, :-1].flatten(1), features[:, :, 1:].flatten(1))


def test_features_are_patches_of_photographs() -> None:
    found = workload.image_features(16, 256, 1024)
    assert found.shape == (16, 256, 1024)
    assert torch.equal(found, workload.image_features(16, 256, 1024))
    assert len({tuple(image[0, :64].tolist()) for image in found}) == 16  # sixteen different images
    assert found.mean().abs() < 0.01
    assert found.std() == pytest.approx(1, rel=0.01)
    assert neighbors(found).min() > 0.7
    assert workload.image_features(2, 17, 1500).shape == (2, 17, 1500)
    assert workload.image_features(2, 0, 64).shape == (2, 0, 64)


def test_without_scikit_learn_the_images_have_a_photographs_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "photographs", lambda: ())
    assert neighbors(workload.image_features(4, 16, 1024)).min() > 0.5
    assert "fractal" in workload.source()


def test_tokens_are_english() -> None:
    found = workload.text_tokens(8, 200, 32000)
    assert found.shape == (8, 200)
    assert 0 <= found.min() <= found.max() < 32000
    counts = torch.bincount(found.flatten())
    assert counts.max() > 20 * counts[counts > 0].float().median()  # "the" and "of" against all others
    assert not torch.equal(found, workload.text_tokens(8, 200, 32000, offset=1600))


def test_hidden_states_are_normalized_and_varied() -> None:
    found = workload.hidden_states(4, 64, 128, device=torch.device("cpu"), dtype=torch.float32)
    assert found.pow(2).mean(-1) == pytest.approx(torch.ones(4, 64).numpy(), rel=1e-4)
    assert len({tuple(row[:8].tolist()) for row in found.flatten(0, 1)}) > 200  # text repeats itself
