"""Arguments as PyTorch allows them: any layout, lazy signs, NaN beside what reads none, numbers of other libraries, one tensor twice."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memvp_kernels import fused_ffn, problem
from memvp_kernels.shared_memory import SharedMemory, fused_ffn_shared
from tests import cases, stack, tolerance
from tests.cases import DEVICE
from tests.dispatch_mode import PassThrough
from tests.tolerance import assert_same

pytestmark = pytest.mark.device
BACKENDS = ("torch", "triton")
FORMS = ("plain", "factored")
Call = Callable[..., Tensor]

try:
    import triton

    if triton.knobs.runtime.interpret:
        from tests.triton.interpreter import repair

        repair()
except ModuleNotFoundError:
    BACKENDS = ("torch",)


def dispatched(**a: Any) -> Tensor:
    with PassThrough():
        return fused_ffn(**a)


def through_shared_memory(*, x: Tensor, visual_key: Tensor, backend: str = "auto", **a: Any) -> Tensor:
    """A factored memory whose key and value are one tensor, through `SharedMemory`."""
    weights = {n: a.get(n) for n in ("key", "value", "gate", "key_bias", "gate_bias", "value_bias")}
    memory = SharedMemory(visual_key, a["visual_basis"], a["key_position"], a["value_position"], x.dtype)
    return fused_ffn_shared(
        x, weights, memory, 0, visual_index=a.get("visual_index"), activation=a.get("activation", "silu"), visual_scale=1.0,
        dropout_p=0.0, recompute=False, backend=backend,
    )  # fmt: skip


def results(a: dict[str, Any], call: Call = fused_ffn, **options: Any) -> list[Tensor]:
    """y and the gradient of every argument that has one."""
    return tolerance.results(call, a | options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a column of a table": lambda t: torch.stack([t + 9, t], 1)[:, 1],
    "every second": lambda t: torch.stack([t, t + 9], 1).flatten()[::2],
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("form", "call", "layout"),
    [
        ("plain", fused_ffn, "a column of a table"),
        ("factored", fused_ffn, "every second"),
        ("plain", dispatched, "every second"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_tensors_of_any_stride(backend: str, form: str, layout: str, dtype: torch.dtype, call: Call) -> None:
    a = cases.build(f"packed_index_lengths-{form}", torch.float32, DEVICE)
    wanted = results(a, backend=backend)
    strided = {n: LAYOUTS[layout](a[n].to(dtype)) for n in ("visual_index", "visual_lengths", "cu_seqlens")}
    assert not any(t.is_contiguous() for t in strided.values())
    assert_same(results(a | strided, call, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_index(backend: str) -> None:
    a = cases.build("index-plain", torch.float32, DEVICE)
    one = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    wanted = results(a | {"visual_index": one.repeat(4)}, backend=backend)
    assert_same(results(a | {"visual_index": one.expand(4)}, backend=backend), wanted)


@pytest.mark.parametrize("name", ["gated_biased_residual-plain", "gated_biased_residual-factored"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lazy_sign_is_read(backend: str, name: str) -> None:
    """A tensor whose negative bit is set, in every floating-point argument and in the gradient."""
    a = cases.build(name, torch.float32, DEVICE) | {"backend": backend}
    names, grad = tolerance.floating(a), torch.randn_like(a["x"])

    def lazy(**b: Any) -> Tensor:
        return fused_ffn(**{n: torch._neg_view(-t) if n in names else t for n, t in b.items()})

    assert_same(tolerance.results(lazy, a, grad=torch._neg_view(-grad)), tolerance.results(fused_ffn, a, grad=grad))


def test_a_shared_core_with_a_lazy_sign() -> None:
    a = cases.build("same_tensor-factored", torch.float32, DEVICE)
    del a["visual_value"]
    lazy = a | {"visual_key": torch._neg_view(-a["visual_key"])}
    for backend in BACKENDS:
        assert torch.equal(through_shared_memory(**lazy, backend=backend), through_shared_memory(**a, backend=backend))


@pytest.mark.parametrize("spoiled", ["key_position", "value_position", "visual_basis", "visual_key", "visual_value"])
@pytest.mark.parametrize(
    "name",
    ["index-factored", "packed_index_lengths-factored", "shared_lengths-factored", "index-plain", "lengths-plain"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_only_the_rows_that_read_it(backend: str, name: str, spoiled: str) -> None:
    """The last slot of every image, which shorter images lack, or the whole basis, which text-only rows don't read."""
    a = cases.build(name, torch.float32, DEVICE)
    if spoiled not in a:
        pytest.skip("a plain memory has no basis")
    grad = torch.randn_like(a["x"])
    wanted, wanted_grads = tolerance.gradients(fused_ffn, a | {"backend": backend}, ["x"], grad)
    a[spoiled] = a[spoiled].clone()
    a[spoiled][..., -1:, :] = float("nan" if "packed" not in name else "inf")
    found, grads = tolerance.gradients(fused_ffn, a | {"backend": backend}, ["x"], grad)
    width, slots = a["x"].shape[-1], a["visual_key"].shape[-2]
    first_slot = 0 if spoiled == "visual_basis" else slots - 1
    reads = torch.tensor(_lengths_read(a)) > first_slot
    for f, w in ((found, wanted), (grads["x"], wanted_grads["x"])):
        f, w = f.reshape(-1, width).cpu(), w.reshape(-1, width).cpu()
        torch.testing.assert_close(f[~reads], w[~reads])
    assert not found.reshape(-1, width).cpu()[reads].isfinite().all(1).any()


@pytest.mark.parametrize("frozen_memory", [False, True])
@pytest.mark.parametrize("name", cases.IDLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_memory_gives_what_is_shared_no_gradient(backend: str, name: str, frozen_memory: bool) -> None:
    """As in PyTorch where nothing is multiplied for it: not even 0 · NaN."""
    a = cases.build(name, torch.float32, DEVICE) | {"backend": backend}
    wanted = [n for n in ("key_position", "value_position", "visual_basis") if n in a]
    wanted += [] if frozen_memory else ["visual_key", "visual_value"]
    grad = torch.randn_like(a["x"])
    _, clean = tolerance.gradients(fused_ffn, a, wanted, grad)
    a["x"][cases.IDLE[name]] = float("nan")
    grad[cases.IDLE[name]] = float("inf")
    _, found = tolerance.gradients(fused_ffn, a, wanted, grad)
    for n in wanted:
        torch.testing.assert_close(found[n], clean[n])


def _lengths_read(a: dict[str, Any]) -> list[int]:
    """How many slots each row of x reads."""
    slots = a["visual_key"].shape[-2]
    lengths = [slots] * 9 if a.get("visual_lengths") is None else a["visual_lengths"].tolist()
    if a["visual_key"].dim() == 2:
        return [lengths[0]] * a["x"].shape[:-1].numel()
    cu = a.get("cu_seqlens")
    counts = [a["x"].shape[1]] * a["x"].shape[0] if cu is None else torch.diff(cu).tolist()
    index = range(len(counts)) if a.get("visual_index") is None else a["visual_index"].tolist()
    return [n for count, i in zip(counts, index, strict=True) for n in [0 if i < 0 else lengths[i]] * count]


@pytest.mark.parametrize("spoiled", ["key_position", "value_position", "visual_basis"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_shared_memory_stays_out_of_text_only_rows(backend: str, spoiled: str) -> None:
    a = cases.build("same_tensor-factored", torch.float32, DEVICE)
    a["visual_index"] = torch.tensor([2, -1, 0], device=DEVICE)
    del a["visual_value"]
    x = a["x"].requires_grad_()
    wanted = through_shared_memory(**a, backend=backend)
    a[spoiled] = torch.full_like(a[spoiled], float("nan"))
    found = through_shared_memory(**a, backend=backend)
    assert torch.equal(found[1], wanted[1])
    assert found[[0, 2]].isnan().all()
    assert torch.autograd.grad(found.sum(), x)[0][1].isfinite().all()


def test_nan_is_contained_without_reading_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking for NaN would synchronize."""
    names = ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
    for spoiled in (None, *names[2:]):
        a = {n: cases.build("one_each-factored", torch.float32)[n] for n in names}
        if spoiled is not None:
            a[spoiled][-1, 3] = float("inf")
        looked = problem.contain(a)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            unseen = problem.contain(a)
        assert (looked is a) == (spoiled is None)
        assert all(torch.equal(looked[n].nan_to_num(7.0), unseen[n].nan_to_num(7.0)) for n in names)  # type: ignore[union-attr]


@pytest.mark.parametrize("call", [fused_ffn, dispatched, torch.compile(fused_ffn, fullgraph=True, backend="aot_eager")])
@pytest.mark.parametrize("name", ["one_each-plain", "packed-factored", "text_only_biased"])
def test_the_output_may_be_changed_in_place_while_training(name: str, call: Call) -> None:
    torch._dynamo.reset()
    a = cases.build(name, torch.float32, DEVICE)

    def changed(**b: Any) -> Tensor:
        y = call(**b)
        y += 1.0
        y[..., 0] = 3.0
        return y

    def copied(**b: Any) -> Tensor:
        y = fused_ffn(**b) + 1.0
        return torch.cat([torch.full_like(y[..., :1], 3.0), y[..., 1:]], -1)

    torch.testing.assert_close(results(a, changed), results(a, copied))


def test_the_output_of_a_shared_memory_may_be_changed_in_place() -> None:
    a = cases.leaves(cases.build("same_tensor-factored", torch.float32, DEVICE))
    del a["visual_value"]
    y = through_shared_memory(**a)
    y += 1.0
    y.sum().backward()
    assert a["visual_key"].grad is not None


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5), Fraction(1, 2), Decimal("0.5")], ids=repr
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_other_libraries(backend: str, number: Any) -> None:
    a = cases.build("one_each-plain", torch.float32, DEVICE)
    for argument in ("visual_scale", "dropout_p"):
        found, wanted = [], []
        for into, value in ((found, number), (wanted, 0.5)):
            torch.manual_seed(3)
            into += results(a, backend=backend, **{argument: value})
        assert_same(found, wanted)
    assert_same(results(a, backend=backend, visual_scale=np.int64(2)), results(a, backend=backend, visual_scale=2.0))


@pytest.mark.parametrize("call", [fused_ffn, dispatched])
@pytest.mark.parametrize(
    "name", ["one_each-plain", "index-factored", "packed_index_lengths-plain", "gated_biased_residual-factored"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients(backend: str, name: str, call: Call) -> None:
    a = cases.leaves(cases.build(name, torch.float32, DEVICE))
    leaves = [t for t in a.values() if isinstance(t, Tensor) and t.requires_grad]
    y = call(**a, backend=backend)
    batch = torch.randn(2, *y.shape, device=DEVICE)

    def gradients(grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, grad, retain_graph=True, **options)

    wanted = [torch.stack(parts) for parts in zip(*map(gradients, batch), strict=True)]
    assert_same(list(gradients(batch, is_grads_batched=True)), wanted)
    assert_same(list(torch.vmap(gradients)(batch)), wanted)


def test_batched_gradients_through_a_shared_memory() -> None:
    a = stack.arguments(torch.float32)
    leaves = [a[n].requires_grad_() for n in stack.trained(a)]
    y = stack.deep(a, stack.memory(a))
    batch = torch.randn(3, *y.shape)
    wanted = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in batch]
    found = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    torch.testing.assert_close(list(found), [torch.stack(parts) for parts in zip(*wanted, strict=True)])


def test_vectorized_jacobian() -> None:
    a = cases.build("index-plain", torch.float64, DEVICE)

    def of_memory(memory: Tensor) -> Tensor:
        return fused_ffn(**{**a, "visual_key": memory, "visual_value": memory})[:2, 0, :3]

    found, wanted = (torch.autograd.functional.jacobian(of_memory, a["visual_key"], vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, wanted)


def _cancelling(form: str, dtype: torch.dtype) -> dict[str, Any]:
    """A memory of one slot whose gradient as a key is -u² and as a value +u² rounded to bfloat16: the sum is -2⁻¹⁴."""
    u = 1 + 2**-7
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    x[..., 0], x[..., 1] = u, 1
    core = torch.tensor([[[0.0, 1.015625, -u]]], dtype=dtype)
    eye = torch.eye(3, 8)
    a = {"x": x, "key": None, "value": None, "activation": "relu"}
    if form == "factored":
        zero = torch.zeros(1, 8, dtype=dtype)
        return a | {"visual_basis": eye.to(dtype), "visual_key": core, "key_position": zero, "value_position": zero}
    return a | {"visual_key": core @ eye.to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sharing", ["one_each", "index", "for_all"])
@pytest.mark.parametrize("call", [fused_ffn, dispatched, through_shared_memory])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_one_tensor_passed_twice_is_rounded_once(
    backend: str, form: str, call: Call, sharing: str, dtype: torch.dtype
) -> None:
    shared = call is through_shared_memory
    if shared and form == "plain":
        pytest.skip("a shared memory is factored")
    a = cases.moved(_cancelling(form, dtype), DEVICE)
    if sharing == "index":
        a["visual_index"] = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    if sharing == "for_all" and not shared:
        a["visual_key"] = a["visual_key"][0]
    memory = a["visual_key"].requires_grad_()
    y = call(**a, **({} if shared else {"visual_value": memory}), backend=backend)
    grad = torch.zeros_like(y)
    grad[..., 0] = grad[..., 2] = 1
    (found,) = torch.autograd.grad(y, memory, grad)
    assert found.flatten()[0].item() == -(2**-14)


@pytest.mark.parametrize("name", ["same_tensor-plain", "same_tensor-factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_passed_twice(backend: str, dtype: torch.dtype, name: str) -> None:
    a = cases.build(name, dtype, DEVICE)
    for call in (fused_ffn, dispatched):
        tolerance.check(lambda call=call, **b: call(**b, backend=backend), a)


@pytest.mark.parametrize(("d", "F", "M", "r"), [(36, 48, 4, None), (37, 1, 1, None), (37, 53, 3, 5), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_of_any_width(backend: str, dtype: torch.dtype, d: int, F: int, M: int, r: int | None) -> None:
    a = cases.memory(cases.ffn(dtype, S=1, T=1, d=d, F=F), R=1, M=M, r=r)
    found = results(cases.moved(a, DEVICE), backend=backend)
    wanted = results({n: t.double() if isinstance(t, Tensor) else t for n, t in a.items()}, backend="torch")
    allowed = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close([f.cpu().double() for f in found], list(wanted), rtol=allowed, atol=allowed)
