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
    return max(2 * relative_error(plain, exact), _rounding(plain))


def judge(
    outputs: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> tuple[float, float]:
    """(error, allowed): root mean square of the relative errors of all results, and twice that of plain PyTorch.

    Over all of them together, because a gradient of a few numbers may be right by luck, and nobody reaches twice its error
    then. A result that is wrong is off by so much more than rounding that the others cannot hide it.

    Args:
        outputs: the candidate's results: an output, or an output and gradients.
        plain: the same of plain PyTorch, in the candidate's dtype.
        exact: the same in float64.

    Raises:
        KeyError: the candidate lacks one of the results.
    """
    error = _root_mean_square([relative_error(outputs[name], exact[name]) for name in exact])
    theirs = _root_mean_square([relative_error(plain[name], exact[name]) for name in exact])
    return error, max(2 * theirs, max(_rounding(plain[name]) for name in exact))


def _root_mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _rounding(result: Tensor) -> float:
    return torch.finfo(result.dtype).eps / 2
