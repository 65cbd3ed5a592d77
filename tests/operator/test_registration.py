"""The operator among PyTorch's own: opcheck, gradcheck, torch.compile, checkpointing, autocast, repeated backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from memvp_kernels import fused_ffn
from memvp_kernels import torch_op as ops
from tests import cases, tolerance
from tests.watching import Watching

FORMS = [
    "one_each-plain",
    "index-plain",
    "index-factored",
    "packed_index_lengths-factored",
    "gated_biased_residual-plain",
    "text_only_plain",
]


def leaves(a: dict[str, Any], *names: str) -> dict[str, Any]:
    chosen = names or tuple(n for n in tolerance.FLOATING if a.get(n) is not None)
    return {n: v.detach().clone().requires_grad_() if n in chosen else v for n, v in a.items()}


SCALARS = ("silu", "silu", 0.5)
KEEP = ops.KEEP_HIDDEN | ops.KEEP_SCORES


@pytest.mark.parametrize("name", FORMS)
def test_opcheck_forward(name: str) -> None:
    a = leaves(cases.build(name, torch.float32))
    torch.library.opcheck(ops.forward_op, (*ops.pack(a), *SCALARS, 0.0, KEEP, True, "torch", None))


def test_opcheck_forward_with_dropout_and_nothing_kept() -> None:
    a = leaves(cases.build("index-factored", torch.float32)) | {"seed": torch.tensor([5])}
    torch.library.opcheck(ops.forward_op, (*ops.pack(a), *SCALARS, 0.3, 0, True, "torch", None))


@pytest.mark.parametrize("name", FORMS)
def test_opcheck_backward(name: str) -> None:
    a = cases.build(name, torch.float32)
    _, pre, scores = ops.forward_op(*ops.pack(a), *SCALARS, 0.0, KEEP, True, "torch", None)
    kept = {"residual": None, "pre": pre if pre.numel() else None, "scores": scores if scores.numel() else None}
    _, needs = ops.pack({n: a.get(n) for n in tolerance.FLOATING if n != "residual"})
    arguments = (torch.randn_like(a["x"]), *ops.pack(a | kept), *SCALARS, 0.0, needs, "torch", None)
    torch.library.opcheck(ops.backward_op, arguments)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize(
    "name", ["index-plain", "packed_index_lengths-factored", "gated_biased_residual-plain", "plain_ffn_biased-factored"]
)
def test_gradcheck(name: str, activation: str) -> None:
    torch.manual_seed(3)  # keeps relu's kink further away than the step of the numerical derivative
    a = leaves(cases.build(name, torch.float64))
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    assert torch.autograd.gradcheck(
        lambda *t: fused_ffn(**{**a, **dict(zip(names, t, strict=True))}, activation=activation),
        [a[n] for n in names],
        fast_mode=True,
    )


@pytest.mark.parametrize("name", FORMS)
def test_the_registered_op_trains_like_the_road_past_it(name: str) -> None:
    """Where nobody watches, training takes an autograd function of its own; both give the same bits."""

    given = cases.build(name, torch.float32)

    def gradients() -> tuple[str, list[Tensor]]:
        a = leaves(given)
        y = fused_ffn(**a)
        assert y.grad_fn is not None
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        return y.grad_fn.name(), [y.detach(), *(a[n].grad for n in tolerance.FLOATING if a.get(n) is not None)]

    road, direct = gradients()
    with Watching():
        registered_road, registered = gradients()
    assert "FusedFFN" in road and "ffn_forward" in registered_road
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(direct, registered, strict=True))


def test_second_derivatives_say_so() -> None:
    a = leaves(cases.build("one_each-plain", torch.float32))
    (first,) = torch.autograd.grad(fused_ffn(**a).square().sum(), a["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
    for name in ("x", "key", "visual_key"):  # of one argument alone, which may otherwise pass for independent
        a = leaves(cases.build("one_each-plain", torch.float32))
        (first,) = torch.autograd.grad(fused_ffn(**a).square().sum(), a["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(first.sum(), a[name], allow_unused=True)


def test_retain_graph_twice() -> None:
    a = leaves(cases.build("index-factored", torch.float32))
    out = fused_ffn(**a)
    one = torch.autograd.grad(out.square().sum(), a["visual_key"], retain_graph=True)[0]
    two = torch.autograd.grad(out.square().sum(), a["visual_key"])[0]
    assert torch.equal(one, two)


def test_in_place_change_of_a_kept_input_is_noticed() -> None:
    a = leaves(cases.build("one_each-plain", torch.float32), "visual_key")
    out = fused_ffn(**a)
    a["key"].add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["one_each-plain", "index-factored", "alone_residual-plain", "text_only_biased"])
def test_compile_fullgraph(name: str) -> None:
    a = cases.build(name, torch.float32)
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    expected = tolerance.gradients(fused_ffn, a, names, grad)
    torch._dynamo.reset()
    got = tolerance.gradients(torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), a, names, grad)
    torch.testing.assert_close(got, expected)


def test_compile_once_for_every_length() -> None:
    """Forward and backward: whatever the first length took, the others take nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_ffn, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for length in (5, 6, 9, 13):
        a = cases.memory(cases.ffn(torch.float32, T=length), R=3)
        names = ["x", "visual_key", "key_position"]
        found, expected = (tolerance.gradients(f, a, names, torch.ones_like(a["x"])) for f in (compiled, fused_ffn))
        torch.testing.assert_close(found, expected)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_inductor() -> None:
    torch._dynamo.reset()
    a = cases.build("index-factored", torch.float32)

    def block(**b: Any) -> Tensor:
        return torch.relu(fused_ffn(**{**b, "x": b["x"] * 2}) + 1)

    names = ["x", "visual_key", "visual_basis"]
    grad = torch.randn_like(a["x"])
    compiled = torch.compile(block, fullgraph=True)
    found, expected = (tolerance.gradients(f, a, names, grad) for f in (compiled, block))
    torch.testing.assert_close(found, expected)


def test_compile_with_dropout() -> None:
    """The seed is drawn in the graph, from the same generator, and the backward replays its mask."""
    torch._dynamo.reset()
    a = cases.build("one_each-factored", torch.float32) | {"dropout_p": 0.5}
    names = ["x", "visual_key"]
    results = []
    for f in (torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), fused_ffn):
        torch.manual_seed(11)
        results.append([tolerance.gradients(f, a, names, torch.ones_like(a["x"])) for _ in range(2)])
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0][0][0], results[0][1][0])


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    a = cases.build("gated_biased_residual-plain", torch.float32)
    names = ["x", "visual_key", "residual"]
    grad = torch.randn_like(a["x"])
    results = []
    for f in (torch.compile(fused_ffn, fullgraph=True, backend="aot_eager"), fused_ffn):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(tolerance.gradients(f, a, names, grad))
    assert results[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_activation_checkpointing(recompute: bool, p: float) -> None:
    a = leaves(cases.build("one_each-factored", torch.float32), "visual_key", "visual_basis", "x")

    def block(x: Tensor) -> Tensor:
        return fused_ffn(**{**a, "x": x}, recompute=recompute, dropout_p=p)

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(7)
        out = checkpoint(block, a["x"], use_reentrant=False) if checkpointed else block(a["x"])
        return list(torch.autograd.grad(out.square().sum(), [a["visual_key"], a["visual_basis"], a["x"]]))

    assert all(torch.equal(p, q) for p, q in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_cast_form(dtype: torch.dtype) -> None:
    a = leaves(cases.build("gated_biased_residual-plain", torch.float32))
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    with torch.autocast("cpu", dtype):
        out = fused_ffn(**a)
        cast = {n: v.to(dtype) if n in ("x", "key", "value", "gate", "residual") else v for n, v in a.items()}
        grads = torch.autograd.grad(out.float().square().sum(), [a[n] for n in names])
    expected = fused_ffn(**cast)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), [a[n] for n in names])
    assert all(g.dtype == torch.float32 and torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    a = cases.build("one_each-plain", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_ffn(**a).dtype == torch.float64


def test_backward_under_autocast_is_the_forward_s_own() -> None:
    """What the forward was cast to decides, not where backward() is called."""
    a = leaves(cases.build("gated_biased_residual-factored", torch.float32))
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]

    def gradients(forward: bool, backward: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = fused_ffn(**a).float().square().sum()
        with torch.autocast("cpu", torch.float16, enabled=backward):
            return torch.autograd.grad(loss, [a[n] for n in names])

    for forward in (False, True):
        for found, expected in zip(gradients(forward, True), gradients(forward, False), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FORMS)
def test_meta_tensors_give_meta_results(name: str) -> None:
    a = cases.build(name, torch.float32) | {"dropout_p": 0.1 if "text" not in name else 0.0}
    a = leaves({n: v.to("meta") if isinstance(v, Tensor) else v for n, v in a.items()})
    with torch.no_grad():
        assert fused_ffn(**a).is_meta
    out = fused_ffn(**a)
    assert out.is_meta
    assert (out.shape, out.dtype) == (a["x"].shape, torch.float32)
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    for n, g in zip(names, torch.autograd.grad(out.sum(), [a[n] for n in names]), strict=True):
        assert g.is_meta
        assert g.shape == a[n].shape


@pytest.mark.parametrize("trainable", [False, True])
def test_vmap(trainable: bool) -> None:
    """Over any tensors, integers too; the autograd around it goes on working."""
    a = cases.build("index-factored", torch.float32)
    xs = torch.stack([a["x"], 2 * a["x"]]).requires_grad_(trainable)
    indices = torch.tensor([[2, -1, 2, 0], [1, 1, -1, 0]])

    def run(x: Tensor, index: Tensor) -> Tensor:
        return fused_ffn(**{**a, "x": x, "visual_index": index})

    out = torch.vmap(run)(xs, indices)
    expected = torch.stack([run(x, i) for x, i in zip(xs, indices, strict=True)])
    assert torch.equal(out, expected)
    shared = torch.vmap(lambda key: fused_ffn(**{**a, "visual_key": key}))(a["visual_key"][None])
    assert torch.equal(shared[0], fused_ffn(**a))
    if trainable:
        grad = torch.randn_like(out)
        found, wanted = (torch.autograd.grad(o, xs, grad)[0] for o in (out, expected))
        assert torch.equal(found, wanted)


def test_vmap_with_dropout_follows_its_randomness() -> None:
    a = cases.build("one_each-plain", torch.float32) | {"dropout_p": 0.5}
    xs = a["x"].expand(2, *a["x"].shape)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: fused_ffn(**{**a, "x": x}))(xs)
    for randomness in ("same", "different"):
        one, two = torch.vmap(lambda x: fused_ffn(**{**a, "x": x}), randomness=randomness)(xs)
        assert torch.equal(one, two) == (randomness == "same")


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
    names = [n for n in tolerance.FLOATING if a.get(n) is not None]
    grad = torch.randn_like(a["x"])
    first, second = (tolerance.gradients(fused_ffn, a, names, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in names)
