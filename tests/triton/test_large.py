"""Matrices of more than 2³¹ elements, N·F of a long batch: every kernel addresses their end with 64 bits.

On a GPU the whole launch runs. In the interpreter only the programs of the last rows do, on memory that is reserved and, but for
those rows, never touched; an address outside an argument raises there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvp_kernels.backends.triton.heuristics import backward_tiles, tiles
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.kernels import dhidden, dinput, hidden, output
from memvp_kernels.backends.triton.kernels.materialise import dense_segments
from memvp_kernels.backends.triton.runtime import launch
from tests import tolerance
from tests.cases import DEVICE
from tests.triton.conftest import INTERPRETED

pytestmark = pytest.mark.device

PAIRS, WIDTH = 4104, 16
ROWS = 2**19 + 40
TILE = Tile(64, 64, 64, 4, 2, group=8)
LAST = slice(2**19, ROWS)  # one row tile, whose first element is past 2³¹ in (N, F)
assert LAST.start * PAIRS > 2**31
assert LAST.start % TILE.block_n == 0


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """In the place of the other tests' NaN: nobody fills gigabytes here."""


@pytest.fixture(autouse=True)
def one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "hidden_tile", lambda _, shape: Tile(64, 64 // shape.branches, 64, 4, 2))
    monkeypatch.setattr(tiles, "output_tile", lambda *_: TILE)
    for name in ("dhidden_tile", "dinput_tile"):
        monkeypatch.setattr(backward_tiles, name, lambda *_: TILE)


@pytest.fixture
def reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Makes large tensors of float16, for the launchers as well: on a CPU in files that take no room where nothing is written."""
    count = iter(range(100))

    def make(*shape: int) -> Tensor:
        if DEVICE.type != "cpu":
            return torch.zeros(*shape, dtype=torch.float16, device=DEVICE)
        numel = torch.Size(shape).numel()
        return torch.from_file(str(tmp_path / f"{next(count)}"), shared=True, size=numel, dtype=torch.float16).view(
            shape
        )

    monkeypatch.setattr(launch, "empty_rows", lambda rows, columns, like, **_: make(rows, columns))
    monkeypatch.setattr(torch, "empty_like", lambda like: make(*like.shape))
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *shape, **options: new_empty(self, *shape, **options) if options else make(*shape),
    )
    return make


def random(*shape: int) -> Tensor:
    return (torch.randn(*shape) / 4).half().to(DEVICE)


def last_rows(columns: int, wanted: Iterable[int]) -> contextlib.AbstractContextManager[None]:
    """The programs of the last row tile and these column tiles, where a launch of all of them is too much."""
    if not INTERPRETED:
        return contextlib.nullcontext()
    from tests.triton.interpreter import only_programs

    row_tiles = -(-ROWS // TILE.block_n)
    first = (row_tiles - 1) // TILE.group * TILE.group  # of the last group, see operands.swizzle
    size = row_tiles - first
    return only_programs(*(first * columns + column * size + (row_tiles - 1 - first) for column in wanted))


def agrees(found: Tensor, product: Callable[[torch.dtype], Tensor], what: str) -> None:
    tolerance.assert_within_twice(found, product(torch.float64), product(torch.float16), what)


@pytest.mark.parametrize("operands", ["descriptors", "pointers"], indirect=True)
def test_hidden_and_what_is_kept(reserved: Callable[..., Tensor], operands: str) -> None:
    x, (gate, key) = random(ROWS, WIDTH), random(2, PAIRS, WIDTH)
    columns = -(-PAIRS // 32)
    with last_rows(columns, [0, columns - 1]):
        out = hidden.hidden_forward(
            x, key, gate, None, None, "silu", None, dense_segments(ROWS), None, save_hidden=True, save_scores=False
        )
    assert out.hidden is not None
    assert out.pre is not None
    for part in (slice(0, 32), slice(PAIRS - 8, PAIRS)):

        def pre(weight: Tensor, dtype: torch.dtype, part: slice = part) -> Tensor:
            return x[LAST].to(dtype) @ weight[part].to(dtype).T

        agrees(out.pre[0, LAST, part], lambda t: pre(gate, t), "gate's pre-activations")
        agrees(out.pre[1, LAST, part], lambda t: pre(key, t), "key's pre-activations")
        agrees(out.hidden[LAST, part], lambda t: F.silu(pre(gate, t)) * pre(key, t), "hidden")


def test_gradients_of_the_pre_activations(reserved: Callable[..., Tensor]) -> None:
    grad, value, pre = random(ROWS, WIDTH), random(PAIRS, WIDTH), reserved(2, ROWS, PAIRS)
    pre[:, LAST] = random(2, ROWS - LAST.start, PAIRS)
    columns = -(-PAIRS // 64)
    with last_rows(columns, [0, columns - 1]):
        out = dhidden.dhidden_backward(
            grad, value, pre, "silu", None, 0, None, dense_segments(ROWS), None, need_visual=False, overwrite=False
        )
    assert out.dpre is not None
    for part in (slice(0, 64), slice(PAIRS - 8, PAIRS)):

        def derivatives(dtype: torch.dtype, part: slice = part) -> Any:
            z, u = (p[LAST, part].to(dtype).requires_grad_() for p in pre)
            return torch.autograd.grad(F.silu(z) * u, (z, u), grad[LAST].to(dtype) @ value[part].to(dtype).T)

        agrees(out.dpre[0, LAST, part], lambda t: derivatives(t)[0], "gate's")
        agrees(out.dpre[1, LAST, part], lambda t: derivatives(t)[1], "key's")


@pytest.mark.parametrize("operands", ["descriptors", "pointers"], indirect=True)
def test_products_over_the_pairs(reserved: Callable[..., Tensor], operands: str) -> None:
    """y from hidden, and dx from the gradients of both pre-activations."""
    left, value, gate = reserved(2, ROWS, PAIRS), random(PAIRS, WIDTH), random(PAIRS, WIDTH)
    left[:, LAST] = random(2, ROWS - LAST.start, PAIRS)
    like = torch.zeros(ROWS, WIDTH, dtype=torch.float16, device=DEVICE)
    with last_rows(1, [0]):
        y = output.output_forward(left[1], value, None, None, None, dense_segments(ROWS), None, like)
        dx = dinput.dinput_backward(left, value, gate, None, None, dense_segments(ROWS), like)
    agrees(y[LAST], lambda t: left[1, LAST].to(t) @ value.to(t), "y")
    agrees(dx[LAST], lambda t: left[0, LAST].to(t) @ gate.to(t) + left[1, LAST].to(t) @ value.to(t), "dx")
