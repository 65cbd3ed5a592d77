"""What the Triton backend's cost model promises for LLaMA-7B's FFN on a Hopper, step by step and by road, beside the floor and the goals.

Nothing here is timed. The rates that everything rests on are those of memvp_kernels.backends.triton.roads and .tiles, which say themselves
which of them are assumed; the floor's are an H200's, measured by a large product and a large copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.presets import PRESETS
from harness.rooflines import FFNShape, Roofs, ffn_backward, ffn_forward, kernel
from memvp_kernels.backends.triton import roads, tiles
from memvp_kernels.backends.triton.shape import Shape

__all__ = ["CASES", "Case", "Launch", "Prediction", "launches", "predict"]

_PRESET = PRESETS["llama-7b"]
_ROOFS = Roofs(matmul_tflops=790, copy_gbs=4300, stream_gbs=4300)
_CHIP = tiles.chip_of(90)
_SIZE = 2  # bytes of a bfloat16
# Shares of the tensor cores' rate in the steps that have no model of their own: products of M x r per image whose operands come by
# pointers, and sums over all rows. Assumed, and small beside the rest.
_CORE_RATE, _SUM_RATE = 0.25, 0.70


@dataclass(frozen=True)
class Case:
    """One pass over S sequences of T tokens, each with its image.

    Attributes:
        backward: the gradients of x and of the memory under a frozen FFN; otherwise the forward.
        training: the forward keeps what the backward needs.
        goal: the most that PERFORMANCE's goals allow, as a multiple of the floor; None: no goal set.
    """

    sequences: int
    tokens: int
    training: bool
    backward: bool = False
    goal: float | None = None

    @property
    def name(self) -> str:
        kind = "training backward" if self.backward else "training forward" if self.training else "prefill"
        return f"{kind}, N = {self.sequences * self.tokens}"


CASES = (
    Case(1, 512, training=False, goal=1 / 0.82),
    Case(2, 512, training=False, goal=1 / 0.88),
    Case(8, 512, training=False, goal=1 / 0.93),
    Case(16, 512, training=True, goal=1.06),
    Case(16, 512, training=True, backward=True, goal=1.09),
)


@dataclass(frozen=True)
class Prediction:
    """Predicted time of a case in µs.

    Attributes:
        road: one of `roads.ROADS`, or "chosen": each large step on the road that the model prefers of those it may choose from.
        steps: by step, in the order in which they run.
        taken: the roads of the large steps.
        floor: the fewest µs by arithmetic and traffic.
    """

    case: Case
    form: str
    road: str
    steps: dict[str, float]
    taken: dict[str, str]
    floor: float

    @property
    def total(self) -> float:
        return sum(self.steps.values())

    @property
    def over_floor(self) -> float:
        return self.total / self.floor


def predict(case: Case, form: str, road: str) -> Prediction:
    """The prediction of a case with a "factored" or a "formed" (plain) memory on one road."""
    size = FFNShape.of(_PRESET, sequences=case.sequences, tokens=case.tokens, visual_tokens=256, element=_SIZE)
    count = ffn_backward(form, size) if case.backward else ffn_forward(form, size, training=case.training)
    shape = _shape(case, form)
    large = ("dhidden", "dinput") if case.backward else ("hidden", "output")
    preferred = dict(zip(roads.STEPS, roads.choice(_CHIP, shape), strict=True))
    taken = {step: preferred[step] if road == "chosen" else road for step in large}
    first, last = ((s, _microseconds(roads.step_cycles(_CHIP, shape, s, taken[s]))) for s in large)
    steps = dict([first, *_between(case, form), last, *(_after(case, form) if case.backward else ())])
    return Prediction(case, form, road, steps, taken, 1e3 * _ROOFS.floor_ms(count))


@dataclass(frozen=True)
class Launch:
    """One fused kernel of a case with plain memory, as the model sees it.

    Attributes:
        tile: with the columns of one result; a gated hidden tile accumulates twice as many.
        shared: bytes of its stages.
        tiles: programs, the memory's and a cut loop's parts included.
        waves: tiles over multiprocessors.
        bytes: the fewest that it must move.
        microseconds: predicted.
    """

    step: str
    tile: tiles.Tile
    shared: int
    tiles: int
    bytes: int
    microseconds: float

    @property
    def waves(self) -> float:
        return self.tiles / _CHIP.multiprocessors


def launches(case: Case) -> Iterator[Launch]:
    """The two large kernels of a case."""
    shape = _shape(case, "formed")
    size = FFNShape.of(_PRESET, sequences=case.sequences, tokens=case.tokens, visual_tokens=256, element=_SIZE)
    for step in ("dhidden", "dinput") if case.backward else ("hidden", "output"):
        tile = roads.fused_tile(_CHIP, shape, step)
        halves = 1 + (step == "hidden")
        row_tiles = -(-shape.rows // tile.block_n)
        if step in ("hidden", "dhidden"):
            count = row_tiles * -(-shape.pairs // tile.columns)
            count += (row_tiles + shape.sequences) * -(-shape.slots // (tile.columns * halves))
        else:
            count = row_tiles * -(-shape.width // tile.columns) * tile.splits
        yield Launch(
            step=step, tile=tile, shared=tile.stages * (tile.block_n + tile.columns * halves) * tile.block_k * _SIZE, tiles=count,
            bytes=kernel(step, size).bytes, microseconds=_microseconds(roads.step_cycles(_CHIP, shape, step, "fused")),
        )  # fmt: skip


def _shape(case: Case, form: str) -> Shape:
    factored, rows = form == "factored", case.sequences * case.tokens
    return Shape(
        dtype=torch.bfloat16, precision="ieee", rows=rows, width=_PRESET.width, pairs=_PRESET.pairs,
        slots=_PRESET.slots + (_PRESET.rank if factored else 0), sequences=1 if factored else case.sequences,
        length=rows if factored else case.tokens, gated=True, dense=factored, descriptors=True,
    )  # fmt: skip


def _between(case: Case, form: str) -> Iterator[tuple[str, float]]:
    """The core kernel of a factored memory: scores and u forward; dvisual, dS, t, visual and u backward."""
    if form != "factored":
        return
    n, m, r = case.sequences * case.tokens, _PRESET.slots, _PRESET.rank
    products, columns = (4, 2 * (r + m) + m + r + m) if case.backward else (2, 2 * (r + m) + m * case.training)
    yield "core", _small(products * 2 * n * m * r, n * columns, _CORE_RATE, launches=1)


def _after(case: Case, form: str) -> Iterator[tuple[str, float]]:
    """Gradients of the memory: of its rows, or of its cores, the basis and the positions."""
    n, d, m, r = case.sequences * case.tokens, _PRESET.width, _PRESET.slots, _PRESET.rank
    if form != "factored":
        yield "memory", _small(4 * n * m * d, 2 * n * (m + d) + 2 * case.sequences * m * d, _SUM_RATE, launches=1)
        return
    yield "cores", _small(2 * n * d * r + 4 * n * m * r, n * d + 2 * n * (m + r), _SUM_RATE, launches=2)
    yield "shared", _small(4 * n * d * (r + m), 2 * n * (d + r + m), _SUM_RATE, launches=2)


def _small(flops: int, numbers: int, rate: float, *, launches: int) -> float:
    chip = _CHIP
    cycles = max(flops / (rate * chip.tensor * chip.multiprocessors), numbers * _SIZE / chip.memory)
    return _microseconds(cycles) + _microseconds(launches * tiles.launch_cycles(chip))


def _microseconds(cycles: float) -> float:
    return cycles / (_CHIP.clock * 1e3)
