"""Training: numerical gradients, repeated and recorded backwards, activation checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from memvp_kernels import fused_ffn
from tests import cases, relatives, tolerance
from tests.dispatch_mode import PassThrough


@pytest.mark.parametrize(
    ("name", "method", "activation"),
    [
        *(
            (name, "memvp", activation)
            for name in ("index-plain", "packed_index_lengths-factored", "gated_biased_residual-plain")
            for activation in ("relu", "gelu", "gelu_tanh", "silu")
        ),
        ("plain_ffn_biased-factored", "memvp", "gelu"),
        *((name, "adem", "silu") for name in ("index-plain", "packed_index_lengths-factored", "same_tensor-factored")),
    ],
)
def test_gradcheck(name: str, method: str, activation: str) -> None:
    torch.manual_seed(3)  # keeps relu's kink further away than the step of the numerical derivative
    a = cases.leaves(relatives.build(name, method, torch.float64))
    names = tolerance.floating(a)
    assert torch.autograd.gradcheck(
        lambda *t: fused_ffn(**{**a, **dict(zip(names, t, strict=True))}, activation=activation),
        [a[n] for n in names],
        fast_mode=True,
    )


@pytest.mark.parametrize("name", cases.FORMS)
def test_direct_and_dispatched_calls_train_alike(name: str) -> None:
    """A call past the dispatcher takes an autograd function of its own; both give the same bits."""
    a = cases.build(name, torch.float32)
    function = fused_ffn(**cases.leaves(a)).grad_fn
    direct = tolerance.results(fused_ffn, a)
    with PassThrough():
        registered_function = fused_ffn(**cases.leaves(a)).grad_fn
        registered = tolerance.results(fused_ffn, a)
    assert "FusedFFN" in type(function).__name__ and "ffn_forward" in type(registered_function).__name__
    tolerance.assert_same(registered, direct)


def test_second_derivatives_say_so() -> None:
    a = cases.leaves(cases.build("one_each-plain", torch.float32))
    (first,) = torch.autograd.grad(fused_ffn(**a).square().sum(), a["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    for name in ("x", "key", "visual_key"):  # of one argument alone, which may otherwise pass for independent
        a = cases.leaves(cases.build("one_each-plain", torch.float32))
        (first,) = torch.autograd.grad(fused_ffn(**a).square().sum(), a["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.sum(), a[name], allow_unused=True)


def test_retain_graph_twice() -> None:
    a = cases.leaves(cases.build("index-factored", torch.float32))
    out = fused_ffn(**a)
    one = torch.autograd.grad(out.square().sum(), a["visual_key"], retain_graph=True)[0]
    two = torch.autograd.grad(out.square().sum(), a["visual_key"])[0]
    assert torch.equal(one, two)


def test_in_place_change_of_a_kept_input_is_noticed() -> None:
    a = cases.leaves(cases.build("one_each-plain", torch.float32), "visual_key")
    out = fused_ffn(**a)
    a["key"].add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_activation_checkpointing(recompute: bool, p: float) -> None:
    a = cases.leaves(cases.build("one_each-factored", torch.float32), "visual_key", "visual_basis", "x")

    def block(x: Tensor) -> Tensor:
        return fused_ffn(**{**a, "x": x}, recompute=recompute, dropout_p=p)

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(7)
        out = checkpoint(block, a["x"], use_reentrant=False) if checkpointed else block(a["x"])
        return list(torch.autograd.grad(out.square().sum(), [a["visual_key"], a["visual_basis"], a["x"]]))

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("gated_biased_residual-plain", "memvp", torch.bfloat16),
        ("gated_biased_residual-plain", "memvp", torch.float16),
        ("index-plain", "adem", torch.bfloat16),
        ("index-factored", "adem", torch.bfloat16),
    ],
)
def test_autocast_is_the_cast_form(name: str, method: str, dtype: torch.dtype) -> None:
    a = cases.leaves(cases.build(name, torch.float32) | relatives.METHODS[method])
    leaves = [a[n] for n in tolerance.floating(a)]
    with torch.autocast("cpu", dtype):
        out = fused_ffn(**a)
        cast = {n: v.to(dtype) if n in ("x", "key", "value", "gate", "residual") else v for n, v in a.items()}
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    expected = fused_ffn(**cast)
    assert out.dtype == dtype
    expected_grads = torch.autograd.grad(expected.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    tolerance.assert_same([out, *grads], [expected, *expected_grads])


def test_autocast_leaves_float64_alone() -> None:
    a = cases.build("one_each-plain", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_ffn(**a).dtype == torch.float64


def test_backward_under_autocast_is_the_forward_s_own() -> None:
    """What the forward was cast to decides, not where backward() is called."""
    a = cases.leaves(cases.build("gated_biased_residual-factored", torch.float32))

    def gradients(forward: bool, backward: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = fused_ffn(**a).float().square().sum()
        with torch.autocast("cpu", torch.float16, enabled=backward):
            return torch.autograd.grad(loss, [a[n] for n in tolerance.floating(a)])

    for forward in (False, True):
        tolerance.assert_same(gradients(forward, True), gradients(forward, False))


def test_transforms_that_differentiate_say_so() -> None:
    a = cases.build("one_each-plain", torch.float32)

    def loss(x: Tensor) -> Tensor:
        return fused_ffn(**{**a, "x": x}).sum()

    x = a["x"]
    for transformed in (
        lambda: torch.func.grad(loss)(x),
        lambda: torch.vmap(torch.func.grad(loss))(x[None]),
        lambda: torch.func.vjp(loss, x),
        lambda: torch.func.jvp(loss, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match=r"fused_ffn: wanted reverse-mode autograd.*torch.autograd.grad"):
            transformed()
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode AD"):
            loss(forward_ad.make_dual(x, x))
        loss(x)
    assert torch.func.grad(lambda y: (y * loss(x)).sum())(x).shape == x.shape  # nothing of it is differentiated


def test_same_inputs_same_bits() -> None:
    """Deterministic: the same inputs give the same bits, forward and backward."""
    a = cases.build("index-factored", torch.bfloat16)
    tolerance.assert_same(tolerance.results(fused_ffn, a), tolerance.results(fused_ffn, a))
