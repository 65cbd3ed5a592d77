"""What is frozen costs nothing: no gradient, no matrix product, no byte kept for the backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop

from memvp_kernels import fused_ffn
from memvp_kernels.backends.torch import eager
from memvp_kernels.problem import normalize
from tests import cases, relatives, tolerance

MEMORY = ("visual_key", "visual_value", "key_position", "value_position")


def trainable(a: dict[str, Any], *names: str) -> dict[str, Any]:
    return {n: v.detach().clone().requires_grad_() if n in names else v for n, v in a.items()}


def kept_bytes(a: dict[str, Any], **options: Any) -> int:
    """Bytes that autograd keeps besides the storages of the arguments."""
    own = {v.untyped_storage().data_ptr() for v in a.values() if isinstance(v, Tensor)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused_ffn(**a, **options)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("method", ["memvp", "adem"])
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_at_most_two_pre_activations_and_the_scores(form: str, method: str) -> None:
    a = cases.build(f"one_each-{form}", torch.float32) | relatives.METHODS[method]
    tokens, pairs, slots = 15, 40, 7
    everything = trainable(a, *tolerance.floating(a))
    assert kept_bytes(everything) == 4 * tokens * (2 * pairs + slots)
    assert kept_bytes(everything, recompute=True) == 0
    ungated = dict(a, gate=None)
    assert kept_bytes(trainable(ungated, "x")) == 4 * tokens * (pairs + slots)


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_autocast_keeps_no_copy_of_a_weight(form: str) -> None:
    """Under autocast the 16-bit weights live for one pass: kept, they would be half as large as the float32 base itself."""
    a = trainable(cases.build(f"gated_biased_residual-{form}", torch.float32), "x", "visual_key")
    tokens, pairs, slots = 15, 40, 7
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(a) == 2 * tokens * (2 * pairs + slots)
        assert kept_bytes(a, recompute=True) == 0


def test_frozen_things_keep_nothing() -> None:
    a = cases.build("one_each-plain", torch.float32)
    tokens, slots = 15, 7
    assert kept_bytes(trainable(a, *MEMORY)) == 4 * tokens * slots  # x is frozen too: no pre-activation is needed
    assert not fused_ffn(**a).requires_grad
    text = cases.build("text_only_biased", torch.float32)
    assert kept_bytes(trainable(text, "value_bias")) == 0


# PyTorch counts the out-of-place forms only; the in-place ones do the same work.
_IN_PLACE = {
    torch.ops.aten.addmm_: lambda self, a, b, out_shape=None, **_: addmm_flop(self, a, b),
    torch.ops.aten.baddbmm_: lambda self, a, b, out_shape=None, **_: baddbmm_flop(self, a, b),
}


def backward_under(mode: Any, a: dict[str, Any], needs: set[str]) -> None:
    """The backend's own backward under `mode`."""
    tensors = {n: a.get(n) for n in ("x", *tolerance.FLOATING, "visual_lengths", "visual_index", "cu_seqlens")}
    scalars = {"activation": "silu", "visual_activation": "silu", "visual_scale": 1.0, "dropout_p": 0.0}
    problem = normalize(tensors, scalars)
    _, pre, scores = eager.forward(problem, save_hidden=True, save_scores=True)
    with mode:
        eager.backward(problem, torch.randn(problem.rows, problem.width), pre, scores, frozenset(needs))


def flops(a: dict[str, Any], needs: set[str]) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=_IN_PLACE)
    backward_under(counter, a, needs)
    return counter.get_total_flops()


def test_each_gradient_costs_its_own_products_only() -> None:
    a = cases.build("one_each-plain", torch.float32)
    N, d, F, M = 15, 24, 40, 7
    ffn, memory = 2 * N * d * F, 2 * N * d * M
    assert flops(a, {"visual_value"}) == memory
    assert flops(a, {"visual_key"}) == 2 * memory  # dVisual, then dKv
    assert flops(a, {"key_position"}) == 2 * memory
    assert flops(a, {"visual_key", "key_position"}) == 2 * memory  # the position's is a sum of the memory's
    assert flops(a, {"x"}) == 3 * ffn + 2 * memory  # dHidden, dG·G, dU·K; dVisual, dS·Kv
    assert flops(a, {"value"}) == ffn
    assert flops(a, {"key"}) == 2 * ffn
    assert flops(a, {"x", *MEMORY}) == 3 * ffn + 4 * memory


def test_factored_gradients_cost_no_wide_product_per_image() -> None:
    a = cases.build("one_each-factored", torch.float32)
    N, d, M, r = 15, 24, 7, 9
    assert flops(a, {"visual_value"}) == 2 * N * d * r + 2 * N * M * r  # dy Wᵀ, then visualᵀ e_w
    score_gradient = 2 * N * d * (r + M) + 2 * N * M * r
    assert flops(a, {"visual_key"}) == score_gradient + 2 * N * d * r + 2 * N * M * r


SWITCHES = ("x", "key", "value", "gate", "visual_key", "visual_value", "key_position")


@pytest.mark.parametrize("method", ["memvp", "adem"])
@pytest.mark.parametrize("form", ["plain", "factored"])
def test_every_matrix_of_frozen_and_trainable(form: str, method: str) -> None:
    a = relatives.build(f"index-{form}", method, torch.float64)
    _, *full = tolerance.results(fused_ffn, a, list(SWITCHES))
    for chosen in itertools.chain.from_iterable(itertools.combinations(SWITCHES, k) for k in (1, 2, 6)):
        _, *found = tolerance.results(fused_ffn, a, list(chosen))
        for n, g in zip(chosen, found, strict=True):
            torch.testing.assert_close(g, full[SWITCHES.index(n)], msg=lambda m, n=n, c=chosen: f"{n} of {c}: {m}")


class _Masked(TorchDispatchMode):
    """How many matrices of x's width are copied with rows of them zeroed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.copies = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.copies += func.name().startswith("aten::masked_fill.") and out.shape[-1] == self.width
        return out


@pytest.mark.parametrize("form", ["plain", "factored"])
def test_nothing_is_copied_where_every_row_reads(form: str) -> None:
    """Rows without memory are zeroed in copies of x and dy, for want of a masked product; a mask that hides nothing costs none."""
    a = cases.build(f"index-{form}", torch.float32)
    for index, copies in (([2, 1, 2, 0], 0), ([2, -1, 2, 0], 2)):
        a["visual_index"] = torch.tensor(index)
        masked = _Masked(a["x"].shape[-1])
        backward_under(masked, a, {"key_position", "value_position"})
        assert masked.copies == copies
