"""What only a GPU shows of the operator: values out of range without a synchronization, graphs, and backends that agree."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memvp_kernels import autograd, fused_ffn, philox
from tests import cases, tolerance
from tests.cases import DEVICE
from tests.gpu import captured
from tests.tolerance import assert_same

pytestmark = pytest.mark.gpu
BACKENDS = ("torch", "triton")
FORMS = ("plain", "factored")
TRAINED = ("x", "visual_key", "visual_value", "visual_basis", "key_position", "value_position")


def step(a: dict[str, Any], **options: Any) -> list[Tensor]:
    """y and the gradients of what MemVP trains, for a gradient of ones times the row's number."""
    names = [n for n in TRAINED if a.get(n) is not None]
    leaves = {n: a[n].detach().requires_grad_() for n in names}
    y = fused_ffn(**{**a, **leaves}, **options)
    grad = torch.arange(y.numel(), device=y.device).reshape(y.shape).remainder(7).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]


def integers(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.fixture
def waiting_raises() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", cases.names())
def test_auto(name: str) -> None:
    """Whatever "auto" takes here for each part of a step, the result is right."""
    tolerance.check(fused_ffn, cases.build(name, torch.bfloat16, DEVICE))


OUT_OF_RANGE: dict[str, tuple[dict[str, list[int]], dict[str, list[int]]]] = {
    "index": ({"visual_index": [0, 3, -7, 2**31 - 1]}, {"visual_index": [0, -1, -1, -1]}),
    "lengths": (
        {"visual_index": [0, 1, 2, 0], "visual_lengths": [5, 8, -2]},
        {"visual_index": [0, 1, 2, 0], "visual_lengths": [5, 0, 0]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", OUT_OF_RANGE)
def test_out_of_range_is_no_memory(
    which: str, backend: str, form: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    a = cases.build(f"index-{form}", torch.bfloat16, DEVICE)  # four sequences, three rows of seven slots
    wild, meant = ({n: integers(*v, dtype=dtype) for n, v in given.items()} for given in OUT_OF_RANGE[which])
    if which == "index" and dtype == torch.int64:
        wild["visual_index"][3] = 2**40  # would be row 0 in 32 bits
    expected = step({**a, **meant}, backend=backend)
    request.getfixturevalue("waiting_raises")
    found = step({**a, **wild}, backend=backend)
    torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_out_of_range_stay_inside_x(backend: str, form: str) -> None:
    """An offset past the rows there are counts as their end."""
    a = cases.build(f"packed_index_lengths-{form}", torch.bfloat16, DEVICE)  # 20 rows
    a["visual_index"] = integers(0, 1, 0, -1, 1)
    meant = step(dict(a, cu_seqlens=integers(0, 4, 4, 15, 17, 20)), backend=backend)
    found = step(dict(a, cu_seqlens=integers(0, 4, 4, 15, 17, 2**31 - 1)), backend=backend)
    assert_same(found, meant)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["index-plain", "packed_index_lengths-factored", "lengths-plain"])
def test_never_synchronizes(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    a = cases.build(name, torch.bfloat16, DEVICE)
    expected = step(a, backend=backend)
    request.getfixturevalue("waiting_raises")
    found = step(a, backend=backend)
    step(a, backend=backend, dropout_p=0.3)
    torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_in_a_cuda_graph_with_dropout(backend: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay draws its own seed, and forward and backward of that replay agree on it."""
    drawn: list[Tensor] = []

    def draw(device: torch.device) -> Tensor:
        drawn.append(autograd.draw_seed(device))
        return drawn[-1]

    monkeypatch.setattr("memvp_kernels.autograd.draw_seed", draw)
    a = cases.build(f"index-{form}", torch.bfloat16, DEVICE)
    run = functools.partial(step, a, backend=backend, dropout_p=0.4)
    graph, found = captured(run)
    seed, seeds = drawn[-1], []
    for _ in range(3):
        graph.replay()
        known = seed.clone()
        seeds.append(int(known))
        monkeypatch.setattr("memvp_kernels.autograd.draw_seed", lambda device, known=known: known)
        assert_same(found, run())
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("name", ["index-plain", "index-factored", "packed_index_lengths-plain"])
def test_backends_drop_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, one mask: each backend is right about the same one."""
    a = cases.build(name, torch.bfloat16, DEVICE) | {"dropout_p": 0.4}
    rows, slots = a["x"].shape[:-1].numel(), a["visual_key"].shape[-2]
    for backend in BACKENDS:
        torch.manual_seed(5)
        keep = philox.keep_mask(autograd.draw_seed(DEVICE), rows, slots, 0.4)

        def run(backend: str = backend, **b: Any) -> Tensor:
            torch.manual_seed(5)
            return fused_ffn(**b, backend=backend)

        tolerance.check(run, a, keep=keep)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointed_on_a_gpu(p: float) -> None:
    """The forward run again in the backward draws the dropout of the first, from the generator's state that PyTorch restores."""
    a = cases.build("one_each-factored", torch.bfloat16, DEVICE)
    leaves = {n: a[n].detach().requires_grad_() for n in ("x", "visual_key", "visual_basis")}

    def block(x: Tensor) -> Tensor:
        return fused_ffn(**{**a, **leaves, "x": x}, dropout_p=p, backend="triton")

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(7)
        x = leaves["x"]
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return list(torch.autograd.grad(y.square().sum(), list(leaves.values())))

    assert_same(run(True), run(False))
