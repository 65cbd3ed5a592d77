"""Where the Gluon interpreter puts the elements of a shared tile: where the installed Triton says, through every kind of view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon import language as gl

from tests.triton.gluon import machine, shared
from tests.triton.gluon.layouts import offsets
from tests.triton.gluon.machine import Machine, ProtocolError, Schedule
from tests.triton.gluon.values import Block


@pytest.fixture(autouse=True)
def _block() -> Any:
    """A thread block to allocate in."""
    machine.enter(Machine(Schedule(), (0,), (1,), 4))
    yield
    machine.leave()


def triton_says(layout: Any, shape: list[int]) -> torch.Tensor:
    """Offset of each index from Triton's own linear layout, which maps bits of an offset to an index."""
    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    bases = torch.tensor(builder.to_linear_layout(layout._to_ir(builder), shape).offset_bases)  # [bits, rank]
    offset = torch.arange(2 ** len(bases))
    bits = offset[:, None] >> torch.arange(len(bases)) & 1
    index = torch.zeros(len(offset), len(shape), dtype=torch.int64)
    for bit, base in enumerate(bases):
        index ^= bits[:, bit, None] * base
    out = torch.full(shape, -1)
    out[tuple(index.T)] = offset
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("swizzle", "bits", "shape"),
    [
        (128, 16, [64, 64]), (128, 16, [64, 256]), (128, 16, [512, 128]), (128, 16, [1, 64, 128]), (128, 16, [2, 128, 128]),
        (128, 32, [16, 64]), (64, 16, [64, 64]), (32, 16, [32, 64]), (0, 16, [64, 32]),
    ],
)  # fmt: skip
def test_offsets(swizzle: int, bits: int, shape: list[int], transposed: bool) -> None:
    if transposed:
        if len(shape) > 2 or shape[0] > 256 or swizzle == 0:
            pytest.skip("not modelled")
        shape = shape[::-1]
    layout = gl.NVMMASharedLayout(swizzle, bits, rank=len(shape), transposed=transposed)
    assert torch.equal(offsets(layout, tuple(shape), bits), triton_says(layout, shape))


def test_plain_offsets() -> None:
    layout = gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    assert torch.equal(offsets(layout, (4, 8), 16), triton_says(layout, [4, 8]))


def numbers(*shape: int) -> Block:
    return Block(torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape).view(torch.float16))


def nvmma(rank: int, swizzle: int = 128, transposed: bool = False) -> Any:
    return gl.NVMMASharedLayout(swizzle, 16, rank=rank, transposed=transposed)


def bits(view: Any) -> torch.Tensor:
    return view.read().view(torch.int16)


def test_unwritten_is_nan() -> None:
    ring = shared.allocate(gl.float16, [3, 64, 64], nvmma(2))
    ring.index(1).store(numbers(64, 64))
    assert ring.index(0).read().isnan().all() and ring.index(2).read().isnan().all()
    assert torch.equal(bits(ring.index(1)), bits(shared.allocate(gl.float16, [64, 64], nvmma(2), numbers(64, 64))))


def test_views_of_the_same_bytes() -> None:
    """What the kernels claim: two boxes of rows are one taller tile, two of columns one wider, a batch of one is no dimension."""
    ring = shared.allocate(gl.float16, [2, 128, 64], nvmma(2))
    halves = ring._reinterpret(gl.float16, [4, 64, 64], nvmma(2))
    low, high = numbers(64, 64), Block(-numbers(64, 64).data)
    halves.index(2).store(low)
    halves.index(3).store(high)
    taller = torch.cat([low.data, high.data]).view(torch.int16)
    wider = torch.cat([low.data, high.data], 1).view(torch.int16)
    assert torch.equal(bits(ring.index(1)), taller)
    assert torch.equal(bits(ring.index(1).permute((1, 0))), taller.T)
    assert torch.equal(bits(ring._reinterpret(gl.float16, [2, 1, 128, 64], nvmma(3)).index(1)), taller[None])
    assert torch.equal(bits(ring._reinterpret(gl.float16, [2, 64, 128], nvmma(2)).index(1)), wider)
    assert torch.equal(bits(ring.index(1).slice(64, 64)), high.data.view(torch.int16))
    assert torch.equal(bits(ring.index(1).reshape([2, 64, 64])), taller.reshape(2, 64, 64))
    # And what would be wrong: another swizzle, or the transposed layout on rows.
    assert not torch.equal(bits(ring._reinterpret(gl.float16, [2, 128, 64], nvmma(2, swizzle=64)).index(1)), taller)
    assert not torch.equal(bits(ring._reinterpret(gl.float16, [2, 64, 128], nvmma(2, transposed=True)).index(1)), wider)
    assert torch.equal(
        bits(ring._reinterpret(gl.float16, [2, 64, 128], nvmma(2, transposed=True)).index(1)), taller.reshape(128, 64).T
    )


def test_refused() -> None:
    ring = shared.allocate(gl.float16, [2, 64, 64], nvmma(2))
    with pytest.raises(ValueError, match="more bytes"):
        ring._reinterpret(gl.float16, [2, 128, 64], nvmma(2))
    with pytest.raises(ValueError, match="smaller than one swizzle pattern"):
        shared.allocate(gl.float16, [64, 32], nvmma(2))
    with pytest.raises(IndexError, match="tile 2 of 2"):
        ring.index(2)
    with pytest.raises(ValueError, match="is a ring"):
        ring.store(numbers(2, 64, 64))
    uneven = shared.allocate(gl.float16, [2, 5, 8, 16], nvmma(2, swizzle=32))
    with pytest.raises(ProtocolError, match="1024 bytes"):
        uneven.index(1)._reinterpret(gl.float16, [8, 64], nvmma(2)).aligned("TMA load")
