"""The tolerance itself: results that are wrong in a small way fail it, and PyTorch's own pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn, reference
from tests import cases, tolerance


def one_slot_short(**a: Any) -> Tensor:
    return fused_ffn(**a, visual_lengths=torch.tensor([7, 7, 6]))


def scale_forgotten(**a: Any) -> Tensor:
    return fused_ffn(**{**a, "visual_scale": 1.0})


def positions_swapped(**a: Any) -> Tensor:
    return fused_ffn(**{**a, "key_position": a["value_position"], "value_position": a["key_position"]})


def neighbours_memory(**a: Any) -> Tensor:
    return fused_ffn(**a, visual_index=torch.tensor([0, 2, 1]))


def gradient_of_gate_lost(**a: Any) -> Tensor:
    return fused_ffn(**{**a, "gate": a["gate"].detach() + 0 * a["gate"]})


def rounded_once_too_often(**a: Any) -> Tensor:
    return fused_ffn(**a).to(torch.float8_e4m3fn).to(a["x"].dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        one_slot_short,
        scale_forgotten,
        positions_swapped,
        neighbours_memory,
        gradient_of_gate_lost,
        rounded_once_too_often,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_mistakes_are_noticed(wrong: Callable[..., Tensor], dtype: torch.dtype) -> None:
    a = cases.build("scaled-plain", dtype)
    with pytest.raises(AssertionError, match="error"):
        tolerance.check(wrong, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["index-plain", "packed_index_lengths-factored", "wide-factored", "gated_biased_residual-plain"]
)
def test_other_orders_are_the_same_mathematics(name: str, dtype: torch.dtype) -> None:
    a = cases.build(name, dtype)
    exact = reference.ffn(**a)
    results = [tolerance.plain(**a), *(tolerance.reordered(seed)(**a) for seed in (1, 2, 3))]
    spread = [tolerance.errors(r, exact)[0] for r in results]
    assert max(spread) <= 3 * min(spread)
    # In bfloat16 sums of this size are accumulated in float32, and their order drowns in the one rounding.
    assert dtype == torch.bfloat16 or not all(torch.equal(results[0], r) for r in results[1:])
