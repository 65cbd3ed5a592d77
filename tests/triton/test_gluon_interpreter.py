"""The Gluon interpreter itself: right kernels give exact results in every schedule, and each mistake planted in one is found."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.semantic import TritonSemantic

from memvp_kernels.backends.triton.activations import activate, activate_derivative
from tests.triton.gluon import example
from tests.triton.gluon.values import Scalar, promoted, torch_dtype
from tests.triton.gluon_interpreter import LATEST, Deadlock, ProtocolError, Race, Schedule, interpreted, run

SCHEDULES = [
    LATEST,
    Schedule("workers first", reads="early"),
    Schedule("default first", loads="early"),
    Schedule("random", "random", "late", seed=1),
    Schedule("random", "random", "early", seed=2),
]
BLOCK = 64


def whole(*shape: int) -> Tensor:
    """Small integers: products of them are exact in float32 in any order."""
    return torch.randint(-2, 3, shape).to(torch.bfloat16)


def products(
    kernel: Any, schedule: Schedule, rows: int, pairs: int, depth: int, stages: int = 3
) -> tuple[Tensor, Tensor]:
    """(what the kernel leaves, what it should)."""
    left, low, high, turned, bias = (
        whole(rows, depth),
        whole(pairs, depth),
        whole(pairs, depth),
        whole(2, depth, pairs),
        whole(pairs),
    )
    out = torch.full((2, rows, pairs), torch.nan, dtype=torch.bfloat16)
    flat, deep = example.FLAT.value, example.DEEP.value
    boxes = [TensorDescriptor.from_tensor(t, [BLOCK, BLOCK], flat) for t in (left, low, high)]
    boxes.append(TensorDescriptor.from_tensor(turned, [2, BLOCK, BLOCK], deep))
    with interpreted(schedule):
        kernel[(2,)](
            *boxes, bias, TensorDescriptor.from_tensor(out, [1, BLOCK, BLOCK], deep), rows,
            F=pairs, K=depth, BLOCK=BLOCK, STAGES=stages, num_warps=4,
        )  # fmt: skip
    want = left.float() @ (torch.stack([low, high]).mT.float() + turned.float())
    want[0] += bias.float()
    return out, want.to(torch.bfloat16)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("rows", "pairs", "depth"), [(64, 64, 64), (100, 136, 200)])
def test_exact(schedule: Schedule, rows: int, pairs: int, depth: int) -> None:
    out, want = products(example.products_kernel, schedule, rows, pairs, depth)
    assert torch.equal(out, want)


EMPTY = "            mbarrier.wait(empty.index(stage), phase)\n            arrived"
RETIRE = "            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))\n            mbarrier.arrive(empty.index(previous), count=1)"

#: Mistakes by what they spoil: (the right text, the wrong one, what each schedule may raise).
MISTAKES = {
    "no wait for an empty stage": (EMPTY, "            arrived", "Race ProtocolError"),
    "no wait for a full stage": ("            mbarrier.wait(full.index(stage), phase)\n            acc = warpgroup_mma(lefts.index(stage), across",
                                 "            acc = warpgroup_mma(lefts.index(stage), across", "Race Deadlock"),
    "released while it is read": ("warpgroup_mma_wait(1", "warpgroup_mma_wait(2", "Race"),
    "released before the wait": (RETIRE, "\n".join(reversed(RETIRE.split("\n"))), "Race"),
    "never released at a tile's end": ("        mbarrier.arrive(empty.index(previous), count=1)\n        first", "        first", "Deadlock"),
    "released twice": ("pred=k > 0", "pred=k >= 0", "Race Deadlock"),
    "producer begins in the wrong phase": ("    phase = 1\n", "    phase = 0\n", "Deadlock"),
    "consumers begin in the wrong phase": ("    phase = 0\n", "    phase = 1\n", "Race Deadlock ProtocolError"),
    "the phase never flips": ("gl.where(last, phase ^ 1, phase)", "phase", "Race Deadlock ProtocolError"),
    "one stage too many": ("stage == STAGES - 1", "stage == STAGES", "IndexError"),
    "one stage too few for the producer": ("            stage, phase = _next(stage, phase, STAGES)", "            stage, phase = _next(stage, phase, STAGES - 1)",
                                           "Race Deadlock ProtocolError"),
    "a stage that is no one's": ("    halves = rights._reinterpret(gl.bfloat16, [2 * STAGES, BLOCK, BLOCK], FLAT)",
                                 "    halves = rights._reinterpret(gl.bfloat16, [2 * STAGES + 1, BLOCK, BLOCK], FLAT)", "ValueError"),
    "more bytes announced than come": ("mbarrier.expect(arrived, 3 *", "mbarrier.expect(arrived, 4 *", "Deadlock"),
    "fewer bytes announced than come": ("mbarrier.expect(arrived, 3 *", "mbarrier.expect(arrived, 2 *", "Race Deadlock ProtocolError"),
    "arrival that nobody makes": ("mbarrier.init(full.index(stage), count=1)", "mbarrier.init(full.index(stage), count=2)", "Deadlock"),
    "barrier that nobody made": ("        mbarrier.init(empty.index(stage), count=1)\n", "", "ProtocolError"),
    "no fence after the barriers": ("    fence_async_shared()\n    gl", "    gl", "ProtocolError"),
    "no fence before a store": ("            fence_async_shared()\n            tma", "            tma", "ProtocolError"),
    "accumulator read too early": ("warpgroup_mma_wait(0, deps=(acc,))", "warpgroup_mma_wait(1, deps=(acc,))", "ProtocolError Race"),
    "accumulator not waited for": ("        sums = warpgroup_mma_wait(0, deps=(acc,))", "        sums = acc", "ProtocolError"),
    "buffer overwritten too early": ("tma.store_wait(1)", "tma.store_wait(2)", "Race"),
    "stores not waited for": ("    tma.store_wait(0)\n", "", "ProtocolError"),
    "another swizzle": ("[STAGES, BLOCK, 2 * BLOCK], FLAT)", "[STAGES, BLOCK, 2 * BLOCK], gl.NVMMASharedLayout(64, 16))", "numbers"),
    "a tile taken for its transpose": ("[STAGES, BLOCK, 2 * BLOCK], FLAT)",
                                       "[STAGES, BLOCK, 2 * BLOCK], gl.NVMMASharedLayout(128, 16, transposed=True))", "numbers"),
    "halves exchanged": ("halves.index(2 * stage))", "halves.index(2 * stage + 1))", "Race"),
    "a box of another layout": ("rights._reinterpret(gl.bfloat16, [STAGES, 2, BLOCK, BLOCK], DEEP)",
                                "rights._reinterpret(gl.bfloat16, [STAGES, 2, BLOCK, BLOCK], gl.NVMMASharedLayout(64, 16, rank=3))", "ProtocolError"),
    "columns off their 16 bytes": ("tma.async_copy_global_to_shared(left, [row, k], arrived,", "tma.async_copy_global_to_shared(left, [row, k + 4], arrived,", "ProtocolError"),
    "no mask": (", mask=o_column < F, other=0.0", "", "IndexError"),
    "layouts that don't meet": ("gl.SliceLayout(0, PIECE)", "gl.SliceLayout(0, WIDE)", "ValueError"),
    "constant from a run-time value": ("_corner(tile, rows, BLOCK)\n        for", "_corner(tile, rows, rows)\n        for", "TypeError"),
}  # fmt: skip


def spoilt(name: str, folder: Path) -> Any:
    """The example's kernel with that mistake in it."""
    right, wrong, _ = MISTAKES[name]
    text = Path(example.__file__).read_text()
    assert right in text, f"the example has changed: {right}"
    path = folder / "spoilt.py"
    path.write_text(text.replace(right, wrong, 1))
    spec = importlib.util.spec_from_file_location("spoilt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.products_kernel


def outcome(kernel: Any, schedule: Schedule) -> str:
    try:
        out, want = products(kernel, schedule, 100, 136, 200)
    except (Race, Deadlock, ProtocolError, IndexError, ValueError, TypeError) as error:
        return type(error).__name__
    return "right" if torch.equal(out, want) else "numbers"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    """In every schedule: a race is one whether or not it happened."""
    kernel = spoilt(mistake, tmp_path)
    found = [outcome(kernel, schedule) for schedule in SCHEDULES]
    assert set(found) <= set(MISTAKES[mistake][2].split()), found


@pytest.mark.parametrize(
    ("mistake", "schedule"),
    [
        ("released while it is read", LATEST),
        ("the phase never flips", Schedule(loads="early")),
        ("buffer overwritten too early", LATEST),
        ("halves exchanged", Schedule("workers first", reads="early")),
    ],
)
def test_mistake_shows_in_numbers(mistake: str, schedule: Schedule, tmp_path: Path) -> None:
    """Without the clocks some schedule shows it: what is read late finds what was written since, what comes late is NaN until then."""
    assert outcome(spoilt(mistake, tmp_path), dataclasses.replace(schedule, races=False)) == "numbers"


def test_messages(tmp_path: Path) -> None:
    """They say where, of both sides."""
    with pytest.raises(
        Race, match=r"TMA load at spoilt.py:\d+ in _produce touches lefts .*: wgmma at spoilt.py:\d+ in _consume"
    ):
        products(spoilt("released while it is read", tmp_path), LATEST, 64, 64, 320)
    with pytest.raises(Deadlock) as caught:
        products(spoilt("never released at a tile's end", tmp_path), LATEST, 64, 264, 64)
    text = str(caught.value)
    assert re.search(r"worker 0 \(_produce\) waits at spoilt.py:\d+ in _produce for phase 0 of empty\[1\]", text), text
    assert "empty[1]: phase 0, 1 of 1 arrivals and 0 bytes outstanding" in text


# What one operation does


def launched(kernel: Any, *arguments: Any, grid: int = 1, schedule: Schedule = LATEST, **named: Any) -> None:
    run(kernel, (grid,), *arguments, schedule=schedule, num_warps=4, **named)


@gluon.jit
def _arithmetic_kernel(x, whole, out, counter, n, scale, BLOCK: gl.constexpr, ACTIVATION: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout=LAYOUT)
    z = gl.load(x + o, mask=o < n, other=0.0).to(gl.float32)
    active, slope = activate_derivative(z, ACTIVATION)
    gl.store(out + o, active * scale, mask=o < n)
    gl.store(out + n + o.to(gl.int64), gl.where(slope > 0, activate(z, ACTIVATION), -1.0), mask=o < n)
    i = gl.load(whole + o, mask=o < n, other=1)
    gl.store(out + 2 * n + o, i // 4 - i % 4 * gl.minimum(i, 3), mask=o < n)
    gl.atomic_add(counter, gl.sum(gl.where(o < n, i, 0), axis=0))


def test_arithmetic() -> None:
    """Shared device code written with triton.language, C's division, masks, atomics; by torch's own operations, so exactly."""
    x, i = torch.randn(100).to(torch.bfloat16), torch.randint(-9, 9, (100,), dtype=torch.int32)
    out, counter = torch.empty(3, 100), torch.zeros(1, dtype=torch.int32)
    launched(_arithmetic_kernel, x, i, out, counter, 100, 0.5, grid=2, BLOCK=64, ACTIVATION="silu")
    z = x.float()
    s = 1.0 / (1.0 + torch.exp(-z))
    act = z * s
    assert torch.equal(out[0], act * 0.5)
    assert torch.equal(out[1], torch.where(s + act * (1.0 - s) > 0, act, -1.0))
    assert torch.equal(out[2], (i.div(4, rounding_mode="trunc") - i.fmod(4) * i.clamp(max=3)).float())
    assert counter.item() == i.sum()


@pytest.mark.parametrize("division", [False, True])
def test_promotion(division: bool) -> None:
    """The types of results are those of the installed Triton."""
    semantic = TritonSemantic.__new__(TritonSemantic)
    known = [gl.int1, gl.int8, gl.int32, gl.int64, gl.float16, gl.bfloat16, gl.float32, gl.float64]
    values = [(d, Scalar(1, torch_dtype(d)), False) for d in known]
    values += [(gl.int1, True, True), (gl.int32, 1, True), (gl.int64, 2**40, True), (gl.float32, 1.0, True)]
    for (a, ours, a_number), (b, theirs, b_number) in itertools.product(values, values):
        if division and a != b and gl.int1 in (a, b):
            continue  # Triton refuses those of unlike signs
        want = semantic.computation_type_impl(a, a_number, b, b_number, division)
        assert promoted(ours, theirs, division) == torch_dtype(want), (ours, theirs)


@gluon.jit
def _rounding_kernel(x, out):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o = gl.arange(0, 128, layout=LAYOUT)
    b = gl.load(x + o)
    gl.store(out + o, b + 0.1)
    gl.store(out + 128 + o, (b.to(gl.float32) + 0.1).to(gl.bfloat16))


def test_rounding() -> None:
    """bfloat16 is computed and rounded as such, ties to even."""
    x, out = torch.randn(128).to(torch.bfloat16), torch.empty(2, 128, dtype=torch.bfloat16)
    x[0] = 1.0
    launched(_rounding_kernel, x, out)
    assert torch.equal(out[0], x + torch.tensor(0.1, dtype=torch.bfloat16))
    assert torch.equal(out[1], (x.float() + 0.1).to(torch.bfloat16))


@gluon.jit
def _beyond_kernel(out, step, STEPS: gl.constexpr):
    at = step
    for _ in range(STEPS):
        at = at * step
    gl.store(out, at)


@gluon.jit
def _address_kernel(out, at):
    gl.store(out + at, 1.0)


def test_beyond() -> None:
    """Neither an index of 32 bits nor an address leaves its range unseen."""
    with pytest.raises(OverflowError, match=r"65536 mul 65536 does not fit torch\.int32"):
        launched(_beyond_kernel, torch.zeros(1, dtype=torch.int64), 65536, STEPS=1)
    rows = torch.zeros(4, 4)
    launched(_address_kernel, rows[1], 3)
    assert rows[1, 3] == 1 and rows.sum() == 1
    for outside in (-1, 4):
        with pytest.raises(IndexError, match="of a tensor of 4"):
            launched(_address_kernel, rows[1], outside)


@gluon.jit
def _neighbour_kernel(x, out, n, STEP: gl.constexpr):
    at = gl.program_id(0)
    gl.store(out + at, gl.load(x + (at + STEP) % n))


def test_programs_run_in_any_order() -> None:
    x, out = torch.arange(4.0), torch.empty(4)
    launched(_neighbour_kernel, x, out, 4, grid=4, STEP=1)
    assert out.tolist() == [1, 2, 3, 0]
    launched(_neighbour_kernel, x, x, 4, grid=4, STEP=0)
    with pytest.raises(Race, match=r"store at .*, in program 1, of an element that is read by program 0"):
        launched(_neighbour_kernel, x, x, 4, grid=4, STEP=1)
    with pytest.raises(Race, match=r"load at .*, in program 1, of an element that is written by program 0"):
        launched(_neighbour_kernel, x, x, 4, grid=4, STEP=3)


@gluon.jit
def _box_kernel(source, target, row, column, SMEM: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.float16, [1, 8, 64], SMEM)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    mbarrier.expect(barrier, 8 * 64 * 2)
    tma.async_copy_global_to_shared(source, [1, row, column], barrier, tile)
    mbarrier.wait(barrier, 0)
    mbarrier.invalidate(barrier)
    tma.async_copy_shared_to_global(target, [0, row + 2, column], tile)
    tma.store_wait(0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (-3, 8), (7, 72), (100, 0), (-8, -64)])
def test_box_at_the_edges(row: int, column: int, schedule: Schedule) -> None:
    """Zeros outside, before the first row, too; a store leaves out what lies outside. The bytes are those of the whole box."""
    source, target = torch.randn(2, 10, 80).half(), torch.full((1, 12, 80), 7.0).half()
    layout = gl.NVMMASharedLayout(128, 16, rank=3)
    boxes = [TensorDescriptor.from_tensor(t, [1, 8, 64], layout) for t in (source, target)]
    launched(_box_kernel, *boxes, row, column, SMEM=layout, schedule=schedule)
    padded = torch.zeros(400, 400).half()
    padded[100:110, 100:180] = source[1]
    placed = torch.full((400, 400), 7.0).half()
    placed[102 + row : 110 + row, 100 + column : 164 + column] = padded[
        100 + row : 108 + row, 100 + column : 164 + column
    ]
    assert torch.equal(target[0], placed[100:112, 100:180])


@gluon.jit
def _barrier_kernel(first, second, count, CASE: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    barrier = barriers.index(0)
    mbarrier.init(barrier, count=2)
    mbarrier.wait(barrier, 1)
    mbarrier.arrive(barrier, count=1, pred=first)
    mbarrier.arrive(barrier, count=1, pred=second)
    if CASE == "two turns":
        mbarrier.wait(barrier, 0)
        mbarrier.arrive(barrier, count=count)
        mbarrier.wait(barrier, 1)
    elif CASE == "wait":
        mbarrier.wait(barrier, 0)
    elif CASE == "phase":
        mbarrier.wait(barrier, count)
    elif CASE == "again":
        mbarrier.init(barrier, count=2)
    elif CASE == "other":
        mbarrier.arrive(barriers.index(1))
    elif CASE == "gone":
        mbarrier.invalidate(barrier)
        mbarrier.wait(barrier, 0)


def test_barriers() -> None:
    launched(_barrier_kernel, True, True, 2, CASE="two turns")
    launched(_barrier_kernel, True, False, 2, CASE="none")
    for arguments, error, message in (
        ((True, True, 3, "two turns"), ProtocolError, "3 more arrivals than the phase takes"),
        ((True, True, 1, "two turns"), Deadlock, "phase 1, 1 of 2 arrivals"),
        ((True, False, 1, "wait"), Deadlock, "phase 0, 1 of 2 arrivals"),
        ((True, True, 2, "phase"), ProtocolError, "phase 2 is neither 0 nor 1"),
        ((True, True, 2, "again"), ProtocolError, "initialised already"),
        ((True, True, 2, "other"), ProtocolError, "not initialised"),
        ((True, True, 2, "gone"), ProtocolError, "not initialised"),
    ):
        with pytest.raises(error, match=message):
            launched(_barrier_kernel, *arguments[:3], CASE=arguments[3])


@gluon.jit
def _store_multiply_kernel(a, b, out, CASE: gl.constexpr, N: gl.constexpr, WARPS: gl.constexpr):
    """out [64, N] = a [64, 64] b [64, N] through ordinary loads and stores, in one partition."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SMEM: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    depth = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    left = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SMEM, gl.load(a + row * 64 + depth))
    right = gl.allocate_shared_memory(gl.bfloat16, [64, N], SMEM)
    if CASE != "unwritten":
        right.store(gl.load(b + row * N + column))
    if CASE != "unfenced":
        fence_async_shared()
    acc = gl.zeros((64, N), gl.float32, MMA)
    acc = warpgroup_mma(left, right, warpgroup_mma_init(acc), is_async=CASE != "synchronous")
    if CASE == "overwritten":
        right.store(gl.load(b + row * N + column))
    if CASE != "synchronous":
        acc = warpgroup_mma_wait(0, deps=(acc,))
    acc = warpgroup_mma(left, right, acc, use_acc=CASE != "twice")
    gl.store(out + row * N + column, gl.convert_layout(acc, LAYOUT))


@pytest.mark.parametrize("reads", ["early", "late"])
def test_multiply(reads: str) -> None:
    a, b, out = whole(64, 64), whole(64, 128), torch.empty(64, 128)
    schedule = Schedule(reads=reads)
    for case, times in (("asynchronous", 2), ("synchronous", 2), ("twice", 1)):
        launched(_store_multiply_kernel, a, b, out, CASE=case, N=128, WARPS=4, schedule=schedule)
        assert torch.equal(out, times * (a.float() @ b.float()))
    launched(_store_multiply_kernel, a, b, out, CASE="unwritten", N=128, WARPS=4, schedule=schedule)
    assert out.isnan().all()
    with pytest.raises(ProtocolError, match="no fence_async_shared since an ordinary store to left"):
        launched(_store_multiply_kernel, a, b, out, CASE="unfenced", N=128, WARPS=4, schedule=schedule)
    with pytest.raises(Race, match=r"store at .* touches right .*: wgmma at"):
        launched(_store_multiply_kernel, a, b, out, CASE="overwritten", N=128, WARPS=4, schedule=schedule)
    with pytest.raises(ProtocolError, match=r"\[8, 1\] warps of an accumulator in a partition of 4"):
        launched(_store_multiply_kernel, a, b, out, CASE="asynchronous", N=128, WARPS=8, schedule=schedule)
