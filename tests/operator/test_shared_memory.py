"""A memory shared by many calls: the operator's gradients, in every mode that walks the graph other than once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memvp_kernels import fused_ffn, reference
from memvp_kernels.shared_memory import SharedMemory, fused_ffn_shared
from tests import stack, tolerance
from tests.dispatch_mode import PassThrough

CASES: dict[str, dict[str, Any]] = {
    "one_each": {},
    "index": {"index": True},
    "alone": {"alone": True},
    "plain_ffn": {"gated": False},
    "one_row_for_all": {"R": 1},
    "no_slots": {"M": 0},
    "materialized": {"materialize": True},
    "materialized_index": {"materialize": True, "index": True},
    "mapped": {"visual_map": "silu", "visual_activation": "identity"},
    "mapped_index": {"visual_map": "silu", "index": True},
}


def _grad(a: stack.Arguments) -> Tensor:
    return torch.randn(a["x"].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(a["x"].dtype)


def _leaves(a: stack.Arguments, *more: str) -> stack.Arguments:
    names = (*stack.trained(a), *more)
    return {n: t.detach().clone().requires_grad_() if n in names else t for n, t in a.items()}


def _backward(y: Tensor, a: stack.Arguments, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(y, [a[n] for n in stack.trained(a)], _grad(a), **options))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_operators(case: str, recompute: bool) -> None:
    a = _leaves(stack.arguments(torch.float64, **CASES[case]), "key0", "value1")
    names = [n for n, t in a.items() if isinstance(t, Tensor) and t.requires_grad]
    wanted, y = stack.through(fused_ffn, **a), stack.shared(a, recompute=recompute)
    torch.testing.assert_close(y, wanted)
    expected = torch.autograd.grad(wanted, [a[n] for n in names], _grad(a), allow_unused=True)
    for name, e, g in zip(names, expected, torch.autograd.grad(y, [a[n] for n in names], _grad(a)), strict=True):
        torch.testing.assert_close(g, torch.zeros_like(a[name]) if e is None else e, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["one_each", "index", "mapped_index", "materialized_index"])
def test_within_twice_pytorchs_own_error(dtype: torch.dtype, case: str) -> None:
    stack.check(stack.arguments(dtype, **CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("exchanged")
def test_inference(case: str, dtype: torch.dtype) -> None:
    """Calls that may take over what an earlier one worked out: FFN after FFN, and the whole once more."""
    a = stack.arguments(dtype, **CASES[case])

    def through(ffn: Callable[..., Tensor], **b: Any) -> Tensor:
        x = b["x"]
        for layer in range(stack.LAYERS):
            x = stack.single(ffn, {**b, "x": x}, layer)
        return x

    with torch.no_grad():
        one = stack.memory(a)
        first, second = stack.deep(a, one), stack.deep(a, one)
    exact = through(
        reference.ffn, **{n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in a.items()}
    )
    assert torch.equal(first, second)
    assert bool(one.steps) == (
        case not in ("index", "materialized_index", "mapped", "mapped_index", "alone", "no_slots")
    )
    if dtype == torch.float64:
        torch.testing.assert_close(first, exact)
    else:
        orders = (tolerance.plain, *(tolerance.reordered(seed) for seed in range(1, 4)))
        tolerance.assert_within_twice(first, exact, [through(f, **a) for f in orders])


def test_a_residual_wider_than_autocasts_output_gets_a_gradient_as_wide() -> None:
    a = stack.arguments(torch.float32)
    residual = torch.randn_like(a["x"]).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = stack.call(a, a["x"], stack.memory(a), 0, residual=residual)
    grad = _grad(a).bfloat16()
    (found,) = torch.autograd.grad(y, residual, grad)
    assert y.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, grad.float())


def test_sums_stay_float32_under_a_half_precision_base() -> None:
    """256 calls of one FFN: each adds the same gradient, and a bfloat16 sum of them stops growing after some."""
    a = stack.arguments(torch.bfloat16)
    a = {n: t.requires_grad_() if n in stack.MEMORY else t for n, t in a.items()}
    one = stack.memory(a)
    (alone,) = torch.autograd.grad(stack.call(a, a["x"], one, 0), a["key_position"], _grad(a))
    many = stack.memory(a)
    outputs = [stack.call(a, a["x"], many, 0, caller) for caller in range(256)]
    (summed,) = torch.autograd.grad(outputs, a["key_position"], [_grad(a)] * 256)
    torch.testing.assert_close(summed, 256 * alone, rtol=256 * torch.finfo(torch.float32).eps, atol=0)


def test_a_second_backward_and_one_for_a_part() -> None:
    a = _leaves(stack.arguments(torch.float32))
    wanted = _backward(stack.shared(a), a)
    y = stack.shared(a)
    tolerance.assert_same(_backward(y, a, retain_graph=True), wanted)
    (x,) = torch.autograd.grad(
        y, a["x"], _grad(a), retain_graph=True
    )  # the memory's own part of the graph does not run
    (position,) = torch.autograd.grad(y, a["key_position"], _grad(a), retain_graph=True)
    tolerance.assert_same([x, position], [wanted[0], wanted[3]])
    tolerance.assert_same(_backward(y, a), wanted)


def test_two_forwards_before_one_backward() -> None:
    a = _leaves(stack.arguments(torch.float64))
    alone = _backward(stack.shared(a), a)
    first, second = stack.shared(a), stack.shared(a)
    both = torch.autograd.grad([first, second], [a[n] for n in stack.trained(a)], [_grad(a), 2 * _grad(a)])
    torch.testing.assert_close(list(both), [3 * one for one in alone])


def test_calls_without_a_part_in_the_loss() -> None:
    """Their outputs are dropped; the others' sum passes them by."""
    a = _leaves(stack.arguments(torch.float64))
    memory = stack.memory(a)
    stack.call(a, a["x"], memory, 0)
    y = stack.call(a, a["x"], memory, 1)
    with torch.no_grad():
        stack.call(a, a["x"], memory, 2)
    stack.call(a, y, memory, 2)
    alone = stack.call(a, a["x"], stack.memory(a), 1)
    tolerance.assert_same(_backward(y, a), _backward(alone, a))


def test_a_caller_that_comes_twice() -> None:
    a = _leaves(stack.arguments(torch.float64))

    def twice(memory: Any) -> Tensor:
        y = stack.call(a, a["x"], memory(), 0)
        return stack.call(a, stack.call(a, y, memory(), 0), memory(), 1)

    one = stack.memory(a)
    found = _backward(twice(lambda: one), a)
    wanted = _backward(twice(lambda: stack.memory(a)), a)
    torch.testing.assert_close(found, wanted)


def test_an_exception_leaves_no_sum_behind() -> None:
    a = _leaves(stack.arguments(torch.float32))
    wanted = _backward(stack.deep(a, stack.memory(a)), a)
    memory = stack.memory(a)
    middle = stack.call(a, a["x"], memory, 0)
    x = stack.deep(dict(a, x=middle), memory, first=1)
    fails = [True]

    def fail(grad: Tensor) -> None:
        if fails.pop():
            fails.append(False)
            raise ArithmeticError

    middle.register_hook(fail)
    with pytest.raises(ArithmeticError):
        _backward(x, a, retain_graph=True)
    tolerance.assert_same(_backward(x, a), wanted)


def test_checkpointed_calls_have_the_same_bits() -> None:
    a = _leaves(stack.arguments(torch.float32))
    wanted = _backward(stack.deep(a, stack.memory(a)), a)
    memory = stack.memory(a)
    x = a["x"]
    for layer in range(stack.LAYERS):
        x = checkpoint(lambda x, n=layer: stack.call(a, x, memory, n), x, use_reentrant=False)
    memory.close()
    tolerance.assert_same(_backward(x, a), wanted)


@pytest.mark.parametrize("case", ["index", "mapped_index"])
def test_dispatched_and_compiled_calls_leave_the_sum_to_autograd(case: str) -> None:
    a = _leaves(stack.arguments(torch.float64, **CASES[case]))
    wanted = _backward(stack.shared(a), a)
    with PassThrough():
        y = stack.shared(a)
        found = _backward(y, a)
    compiled = _backward(torch.compile(stack.shared, fullgraph=True, backend="aot_eager")(a), a)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(compiled, wanted)


def test_one_dispatched_call_between_two_direct_ones() -> None:
    a = _leaves(stack.arguments(torch.float64))
    wanted = _backward(stack.deep(a, stack.memory(a)), a)
    memory = stack.memory(a)
    x = stack.call(a, a["x"], memory, 0)
    with PassThrough():
        x = stack.call(a, x, memory, 1)
    torch.testing.assert_close(_backward(stack.call(a, x, memory, 2), a), wanted)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    a = _leaves(stack.arguments(torch.float64))
    first = _backward(stack.shared(a), a, create_graph=True)
    tolerance.assert_same(first, _backward(stack.shared(a), a))
    with pytest.raises(RuntimeError, match="no second derivative"):
        first[1].sum().backward()
    # Of x alone, which may otherwise pass for independent.
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(_backward(stack.shared(a), a, create_graph=True)[1].sum(), a["x"], allow_unused=True)


@pytest.mark.parametrize("visual_map", [None, "silu"])
def test_a_pair_of_positions_for_each_caller(visual_map: str | None) -> None:
    a = _leaves(stack.arguments(torch.float64))
    pairs = [torch.randn(stack.LAYERS, 7, 24, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    memory = SharedMemory(a["core"], a["basis"], *pairs, torch.float64, visual_map=visual_map)
    x = wanted = a["x"]
    for layer in range(stack.LAYERS):
        x = stack.call(a, x, memory, layer)
        own = (a["core"], a["basis"], pairs[0][layer], pairs[1][layer])
        wanted = stack.call(a, wanted, SharedMemory(*own, torch.float64, visual_map=visual_map), layer)
    leaves = [a["x"], a["core"], a["basis"], *pairs]
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, _grad(a)) for y in (x, wanted)))


def test_a_frozen_part_gets_no_gradient() -> None:
    a = stack.arguments(torch.float64)
    a["value_position"].requires_grad_()
    y = stack.shared(a)
    (found,) = torch.autograd.grad(y, a["value_position"], _grad(a))
    (wanted,) = torch.autograd.grad(stack.through(fused_ffn, **a), a["value_position"], _grad(a))
    torch.testing.assert_close(found, wanted)
    frozen = {n: t.detach() for n, t in a.items()}
    assert not stack.shared(frozen).requires_grad


def test_a_forward_that_nobody_goes_back_through_is_freed() -> None:
    a = _leaves(stack.arguments(torch.float32))
    memory = stack.memory(a)
    x = a["x"]
    for layer in range(stack.LAYERS):
        x = checkpoint(lambda x, n=layer, m=memory: stack.call(a, x, m, n), x, use_reentrant=False)
    memory.close()
    alive = weakref.ref(memory)
    del memory, x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("layered", [False, True])
def test_packed_rows_over_a_core_that_changes(layered: bool) -> None:
    """As a server calls it: the FFN runs elsewhere, its output comes as the residual, and the core's buffer is written anew between the calls."""
    draw = torch.Generator().manual_seed(0)
    x, y, core, basis = (torch.randn(shape, generator=draw) for shape in ((9, 16), (9, 16), (3, 5, 4), (4, 16)))
    key, value = torch.randn(2, *([2] if layered else []), 5, 16, generator=draw)
    segments = {"visual_index": torch.tensor([2, -1, 0]), "cu_seqlens": torch.tensor([0, 4, 6, 9])}
    memory = SharedMemory(core, basis, key, value, torch.float32, finite=True)
    for caller in range(2):
        core.normal_(generator=draw)
        found = fused_ffn_shared(
            x, {}, memory, caller, **segments, residual=y, activation="silu", visual_scale=0.7, dropout_p=0.0, recompute=False,
            backend="torch",
        )  # fmt: skip
        parts = (key[caller], value[caller]) if layered else (key, value)
        wanted = fused_ffn(
            x, None, None, core, core, visual_basis=basis, key_position=parts[0], value_position=parts[1], **segments, residual=y,
            activation="silu", visual_scale=0.7, backend="torch",
        )  # fmt: skip
        torch.testing.assert_close(found, wanted)
