"""The Gluon road: numbers by the rules of the other two, the barriers under every order of events, and which operands it leaves to its twins."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonJITFunction

from memvp_kernels import fused_ffn, philox, reference
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import hopper, launch, library, ring_tiles, roads, steps, tiles
from memvp_kernels.backends.triton.hopper import epilogue, ring
from memvp_kernels.backends.triton.hopper import steps as gluon_steps
from memvp_kernels.backends.triton.hopper.operands import takes
from memvp_kernels.problem import Segments
from tests import cases, yardstick
from tests.cases import DEVICE
from tests.triton.conftest import INTERPRETED
from tests.triton.gluon_interpreter import Deadlock, ProtocolError, Race, Schedule, interpreted
from tests.triton.test_backward_needs import FORMS, assert_equal, dy, problem, trainable

pytestmark = pytest.mark.device
run = functools.partial(fused_ffn, backend="triton")

ROOT = Path(__file__).resolve().parents[2]
BF16, FP16 = torch.bfloat16, torch.float16
WIDE, NARROW = ring_tiles.TILES["gluon"]
KERNELS = {"gluon_hidden_kernel", "gluon_output_kernel", "gluon_dhidden_kernel"}
#: Who goes first and when what was begun is done; `LATEST` is one more.
SCHEDULES = (
    Schedule("workers first", "early", "early"),
    Schedule("random", "random", "late", seed=1),
    Schedule("random", "late", "early", seed=2),
)


@pytest.fixture(scope="module", autouse=True)
def they_end() -> None:
    """A wrong barrier hangs a GPU's kernel, and with it all tests to come: the first launches there have a process and a limit of their own."""
    if not INTERPRETED and torch.cuda.get_device_capability() == (9, 0):
        program = f"import torch; from {__name__} import every_step; every_step(False, True, torch.bfloat16); torch.cuda.synchronize()"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=True)


@pytest.fixture(autouse=True)
def gluon_road(fused_road: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The Gluon road, interpreted where there is no GPU, and the names of its kernels as they are launched."""
    if not INTERPRETED and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for Hopper")
    launched: list[str] = []
    with interpreted() if INTERPRETED else contextlib.nullcontext(), steps.forced("gluon"):
        known = GluonJITFunction.run

        def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
            launched.append(self.fn.__name__)
            return known(self, *arguments, **options)

        monkeypatch.setattr(GluonJITFunction, "run", recorded)
        yield launched


def widest(monkeypatch: pytest.MonkeyPatch, tile: tiles.Tile = WIDE) -> None:
    """Problems as small as these would all take the narrow tile."""
    monkeypatch.setattr(gluon_steps, "ring_tile", lambda *_: tile)


def few_programs(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """A chip of so few multiprocessors that a program owns several tiles."""
    chip = tiles.chip_of(90, programs)
    monkeypatch.setattr(launch, "chip", lambda device: chip)


#: Each with what it adds to the kernels' paths; the rest of `cases.names()` reaches none of its own.
CASES = (
    *(f"{sharing}-{form}" for sharing, form in itertools.product(
        ("one_each", "shared_by_all", "index", "shared_lengths", "packed_index_lengths", "plain_ffn_biased",
         "gated_biased_residual", "contiguous_value"), FORMS,
    )),
    "no_positions-factored", "one_slot-factored", "alone-factored", "alone_residual-factored",
    "text_only", "text_only_plain", "text_only_biased", "any_leading_shape", "vector_shared_memory",
    "relu", "gelu", "gelu_tanh", "nobody_has_memory",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "tile"),
    list(zip(CASES, itertools.cycle((BF16, FP16)), itertools.cycle((WIDE, WIDE, WIDE, NARROW)), strict=False)),
    ids=lambda value: f"{value.columns} wide" if isinstance(value, tiles.Tile) else str(value),
)
def test_case(
    name: str, dtype: torch.dtype, tile: tiles.Tile, gluon_road: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widest(monkeypatch, tile)
    yardstick.check(run, cases.build(name, dtype, DEVICE))
    assert set(gluon_road) == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.names())
@pytest.mark.parametrize("tile", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_case(name: str, dtype: torch.dtype, tile: tiles.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    widest(monkeypatch, tile)
    yardstick.check(run, cases.build(name, dtype, DEVICE))


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_the_same_philox(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = dict(cases.build(f"index-{form}", BF16, DEVICE), dropout_p=0.4, recompute=True)
    seed = torch.tensor([0x1234_5678_9ABC_DEF], device=DEVICE)
    monkeypatch.setattr("memvp_kernels.ffn.draw_seed", lambda device: seed)
    rows, slots = a["x"].shape[0] * a["x"].shape[1], a["visual_key"].shape[1]
    yardstick.check(run, a, keep=philox.keep_mask(seed, rows, slots, 0.4))


def test_saved_or_formed_again_the_same_bits() -> None:
    p = problem("factored", dropout_p=0.3)
    y, pre, scores = backend.forward(p, save_hidden=True, save_scores=True)
    # Without the gradient of value, dpre takes the place of the pre-activations formed again.
    needs = trainable(p) - {"value"}
    first = backend.backward(p, dy(p), pre, scores, needs)
    assert_equal(backend.backward(p, dy(p), None, None, needs), first, needs)
    assert torch.equal(backend.forward(p, save_hidden=False, save_scores=False)[0], y)


def whole(*shape: int, dtype: torch.dtype = BF16, turned: bool = False) -> Tensor:
    """Small whole numbers, whose products and sums are exact in float32; `turned`: stored the other way round."""
    drawn = torch.randint(-1, 2, shape).to(dtype)
    return (drawn.mT.contiguous().mT if turned else drawn).to(DEVICE)


def exact(*terms: Tensor, dtype: torch.dtype = BF16) -> Tensor:
    return torch.stack([t.double() for t in terms]).sum(0).to(dtype)


ROWS, WIDTH, PAIRS, SLOTS = 300, 264, 328, 40  # two or three tiles each way, three to six steps, a tail everywhere
SHARED = Segments(rows=ROWS, sequences=1, length=ROWS, shared=True)


def every_step(turned: bool, gated: bool, dtype: torch.dtype) -> None:
    """The four steps, each exact, on several tiles with a shared memory; what the activation's slope leaves exact is compared."""
    draw = functools.partial(whole, dtype=dtype)
    x, key, memory = draw(ROWS, WIDTH), draw(PAIRS, WIDTH, turned=turned), draw(1, SLOTS, WIDTH)
    gate = draw(PAIRS, WIDTH, turned=turned) if gated else None
    value, bias, residual = draw(PAIRS, WIDTH, turned=not turned), draw(2 * WIDTH).float()[::2], draw(ROWS, WIDTH)
    key_bias = torch.arange(PAIRS, device=DEVICE) % 5 - 2.0
    made = hopper.hidden(
        x,
        key,
        gate,
        key_bias,
        key_bias if gated else None,
        "relu",
        memory,
        SHARED,
        None,
        save_hidden=True,
        save_scores=True,
    )
    branches = [b.double() @ x.double().T for b in ([key] if gate is None else [gate, key])]
    wanted = torch.stack([b.T + key_bias for b in branches])
    assert made.pre is not None and made.scores is not None and made.hidden is not None
    assert torch.equal(made.pre, wanted.to(dtype))
    assert torch.equal(made.hidden, (wanted[0].relu() * (wanted[1] if gated else 1)).to(dtype))
    assert torch.equal(made.scores, exact(x.double() @ memory[0].double().T, dtype=dtype))

    hidden, visual = draw(ROWS, PAIRS), draw(ROWS, SLOTS)
    y = hopper.output(hidden, value, bias, visual, memory, SHARED, residual, x)
    products = hidden.double() @ value.double(), visual.double() @ memory[0].double()
    assert torch.equal(y, exact(*products, bias.expand_as(y), residual, dtype=dtype))

    pre, grad = draw(1 + gated, ROWS, PAIRS), draw(ROWS, WIDTH)
    columns = functools.partial(hopper.dhidden, memory=memory, memories=1, scores=None, segments=SHARED, visual=None)
    dhidden = grad.double() @ value.double().T
    slope = (pre[0] > 0).double()
    wanted = torch.stack([dhidden * pre[1] * slope, dhidden * pre[0].relu()] if gated else [dhidden * slope]).to(dtype)
    for overwrite in (False, True):
        found = columns(grad, value, pre, "relu", need_visual=False, overwrite=overwrite)
        assert found.dpre is not None and found.columns is not None
        assert (found.dpre is pre) == overwrite
        assert torch.equal(found.dpre, wanted)
        assert torch.equal(found.columns, exact(grad.double() @ memory[0].double().T, dtype=dtype))

    dpre = draw(1 + gated, ROWS, PAIRS)
    dx = hopper.dinput(dpre, key, gate, visual, memory, SHARED, x)
    weights = [key] if gate is None else [gate, key]
    lefts = [d.double() @ w.double() for d, w in zip(dpre, weights, strict=True)]
    assert torch.equal(dx, exact(*lefts, products[1], dtype=dtype))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("turned", [False, True], ids=["as_named", "turned"])
@pytest.mark.parametrize("tile", [WIDE, NARROW], ids=["wide", "narrow"])
def test_weights_either_way_round(
    turned: bool, gated: bool, tile: tiles.Tile, gluon_road: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, so that no column of a tile is another's; two programs for all tiles."""
    widest(monkeypatch, tile)
    few_programs(monkeypatch, 2)
    every_step(turned, gated, FP16 if turned else BF16)
    assert len(gluon_road) == 5


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has its own schedule")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order}, loads {s.loads}, reads {s.reads}")
def test_in_every_order_of_events(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    widest(monkeypatch, NARROW)
    few_programs(monkeypatch, 3)
    with interpreted(schedule):
        every_step(False, True, BF16)


@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (True, "gelu"), (False, "gelu_tanh")])
def test_an_epilogue_beside_the_next_tiles_products(
    gated: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much of it waits goes by what is alive in it: none, some or all. Products of small whole numbers, so that only the epilogue rounds."""
    widest(monkeypatch)
    few_programs(monkeypatch, 2)
    x, key, value = whole(ROWS, 72), whole(520, 72), whole(520, 72)
    gate = whole(520, 72) if gated else None
    ffn = x, key, gate, None, None, activation, None, SHARED, None
    found, theirs = (road.hidden(*ffn, save_hidden=True, save_scores=False) for road in (hopper, library))
    assert found.pre is not None and found.hidden is not None and theirs.hidden is not None
    pre = torch.stack([x.double() @ w.double().T for w in (gate, key) if w is not None])
    assert torch.equal(found.pre, pre.to(BF16))

    pre.requires_grad_()
    active = reference.activate(activation, pre[0])
    formed = active * pre[1] if gated else active
    yardstick.assert_within_twice(found.hidden, formed.detach(), theirs.hidden)
    grad = whole(ROWS, 72)
    (exact,) = torch.autograd.grad(formed, pre, grad.double() @ value.double().T)
    back = grad, value, found.pre, activation, None, 0, None, SHARED, None
    dpre, other = (road.dhidden(*back, need_visual=False, overwrite=False).dpre for road in (hopper, library))
    assert dpre is not None and other is not None
    yardstick.assert_within_twice(dpre, exact, other)


@pytest.mark.parametrize("programs", [1, 2, 100])
def test_a_programs_tiles_are_nobody_elses(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share a launch: the same bits."""
    widest(monkeypatch, NARROW)
    few_programs(monkeypatch, programs)
    x, key, memory = whole(ROWS, 72), whole(136, 72), whole(1, 264, 72)
    made = hopper.hidden(x, key, None, None, None, "relu", memory, SHARED, None, save_hidden=False, save_scores=True)
    assert made.hidden is not None and made.scores is not None
    assert torch.equal(made.hidden, exact(x.double() @ key.double().T).relu())
    assert torch.equal(made.scores, exact(x.double() @ memory[0].double().T))


@pytest.mark.parametrize("index", [None, [1, -1, 0]], ids=["own", "index"])
def test_a_memory_per_sequence_in_whole_tiles(
    index: list[int] | None, gluon_road: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output's own launch where no tile straddles sequences; one image's NaN stays in its sequences."""
    fallen: list[str] = []
    monkeypatch.setattr(gluon_steps, "output_forward", lambda *_, **__: fallen.append("output"))
    few_programs(monkeypatch, 2)
    table = None if index is None else torch.tensor(index, dtype=torch.int32, device=DEVICE)
    segments = Segments(rows=384, sequences=3, length=128, index=table)
    images = 3 if index is None else 2
    memory, visual = whole(images, SLOTS, 72), whole(384, SLOTS)
    hidden, value, gate = whole(384, 72), whole(72, 72, turned=True), whole(72, 72)
    reads = range(3) if index is None else index
    each = [visual[128 * s : 128 * (s + 1)].double() @ memory[r].double() * (r >= 0) for s, r in enumerate(reads)]
    own = torch.cat(each)
    y = hopper.output(hidden, value, None, visual, memory, segments, None, hidden)
    assert torch.equal(y, exact(hidden.double() @ value.double(), own))
    dpre = whole(2, 384, 72)
    dx = hopper.dinput(dpre, value, gate, visual, memory, segments, hidden)
    assert torch.equal(dx, exact(dpre[0].double() @ gate.double(), dpre[1].double() @ value.double(), own))
    assert torch.equal(hopper.output(None, None, None, visual, memory, segments, None, hidden), exact(own))
    assert gluon_road == ["gluon_output_kernel"] * 3
    assert not fallen
    memory[1] = float("nan")
    touched = hopper.output(hidden, value, None, visual, memory, segments, None, hidden).isnan().any(1)
    assert touched.view(3, 128).all(1).tolist() == [r == 1 for r in reads]
    assert touched.sum() == 128


def test_which_operands_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = whole(40, 64), whole(48, 64)
    assert takes(x, [x, None], [weight, weight.mT.contiguous().mT, None], [48])
    assert takes(x.half(), [x.half()], [weight.half()], [])
    assert not takes(x.float(), [x.float()], [weight.float()], [])
    assert not takes(x, [x], [weight.half()], [])
    assert not takes(x, [x.mT.contiguous().mT], [weight], [])
    assert not takes(x, [x[:, 1:]], [weight], [])
    assert not takes(x, [x], [weight[:, ::2]], [])
    assert not takes(x, [x], [weight], [44])
    for architecture in (80, 100):
        monkeypatch.setattr(launch, "architecture", lambda device, a=architecture: a)
        assert not takes(x, [x], [weight], [48])


@pytest.mark.parametrize(
    ("which", "form"),
    [
        ("x_every_second", "plain"),
        ("gate_transposed", "plain"),
        ("key_position_transposed", "factored"),
    ],
)
def test_layouts(which: str, form: str) -> None:
    """What has no descriptor, or gate and key the other way round from each other, is the fused twin's."""
    yardstick.check(run, dict(cases.strided(cases.build(f"one_each-{form}", BF16, DEVICE)))[which])


@pytest.mark.parametrize("name", ["odd_sizes-plain", "odd_sizes-factored", "alone-plain"])
def test_what_it_cannot_take_is_the_fused_twins(name: str, gluon_road: list[str]) -> None:
    yardstick.check(run, cases.build(name, BF16, DEVICE))
    assert gluon_road == []


def test_the_tile_goes_by_the_waves() -> None:
    """LLaMA-7B's output on 132 multiprocessors: 64 wide tiles at 512 rows would leave half of them idle; then the wide one."""
    chip = tiles.chip_of(90)
    tile_of = functools.partial(ring_tiles.ring_tile, chip, "gluon")
    assert [tile_of(rows, (4096,), 11008) for rows in (512, 1024, 8192)] == [NARROW, WIDE, WIDE]
    assert tile_of(512, (2 * 11008, 456), 4096) == WIDE
    for tile in ring_tiles.TILES["gluon"]:
        stages = tile.stages * (tile.block_n + tile.columns) * tile.block_k * 2
        assert stages + 2 * tile.block_n * epilogue.PIECE.value * 2 + 1024 <= chip.shared


def test_it_is_asked_for_and_never_chosen() -> None:
    assert set(roads.ROADS) == set(steps.ON_ROAD)
    assert "gluon" not in roads.CHOSEN_FROM
    with steps.forced(None):
        chosen = steps.steps_of(problem())
    assert not {getattr(chosen, s) for s in roads.STEPS} & {getattr(steps.Gluon, s) for s in roads.STEPS}


@gluon.jit
def _never(empty, step, pred=True):
    pass


@gluon.jit
def _while_it_is_read(empty, step, pred=True):
    ring.mbarrier.arrive(empty.index((step + 1) & (empty.shape[0] - 1)), count=1)


@gluon.jit
def _no_fence(cluster=False):
    pass


@gluon.jit
def _no_wait():
    pass


@pytest.mark.skipif(not INTERPRETED, reason="a GPU would hang or give wrong numbers")
@pytest.mark.parametrize(
    ("module", "name", "mistake", "error"),
    [
        ("ring", "release", _never, Deadlock),
        ("ring", "release", _while_it_is_read, Race),
        ("epilogue", "fence_async_shared", _no_fence, ProtocolError),
        ("hidden", "finish_stores", _no_wait, ProtocolError),
    ],
)
def test_a_planted_mistake_shows(
    module: str, name: str, mistake: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each breaks one rule of the protocol; without it the same launch is right."""
    widest(monkeypatch, NARROW)
    few_programs(monkeypatch, 1)
    x, key = whole(ROWS, 328), whole(136, 328)
    ask = functools.partial(
        hopper.hidden, x, key, key, None, None, "relu", None, SHARED, None, save_hidden=True, save_scores=False
    )
    ask()
    monkeypatch.setattr(importlib.import_module(f"{hopper.__name__}.{module}"), name, mistake)
    with pytest.raises(error):
        ask()
