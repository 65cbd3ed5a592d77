"""The check that comes before any time: error against float64, at most twice plain PyTorch's own in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["allowed_error", "judge", "relative_error"]


def relative_error(out: Tensor, exact: Tensor) -> float:
    """‖out − exact‖ / ‖exact‖; infinite where `out` is not finite or has another shape."""
    if out.shape != exact.shape or not bool(torch.isfinite(out).all()):
        return math.inf
    difference = (out.detach().double() - exact.detach().double()).norm().item()
    size = exact.detach().double().norm().item()
    return float(difference / size if size else difference)


def allowed_error(plain: Tensor, exact: Tensor) -> float:
    """Twice the error of `plain`, PyTorch's own result; never less than correct rounding of the result itself costs."""
    rounding = torch.finfo(plain.dtype).eps / 2
    return max(2 * relative_error(plain, exact), rounding)


def judge(
    outputs: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(error, allowed) of whichever named output comes closest to, or exceeds, what it is allowed.

    Args:
        outputs: the candidate's results: an output, or an output and gradients.
        plain: the same of plain PyTorch, in the candidate's dtype.
        exact: the same in float64.

    Raises:
        KeyError: the candidate lacks one of the results.
    """
    pairs = [(relative_error(outputs[name], exact[name]), allowed_error(plain[name], exact[name])) for name in exact]
    return max(pairs, key=lambda pair: pair[0] / pair[1])
