"""What is compiled offline: every kernel of the Triton backend, each tile that its cost model can return, in the forms a call can take.

A case is a problem of LLaMA-7B's shape on tensors that nobody fills, run through the backend's own forward or backward with one tile in
place of the cost model's choice, so the specialisations are the launchers' own. A kernel that meets a second case unchanged is
compiled and read once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from harness.machine_code import Compiled, offline
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton.gemm import forced
from memvp_kernels.backends.triton.heuristics import hopper_tiles as ring_tiles
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.problem import SHARED, Problem, Segments

__all__ = ["NUMBERS", "Case", "cases", "launches", "problem_of"]

NUMBERS = ("bfloat16", "tf32", "float16", "float32")

_WIDTH, _PAIRS, _SLOTS, _RANK = 4096, 11008, 320, 136
_MEMORY = ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
#: What a backward is asked for, by name.
_NEEDS = {
    "kept": ("x", *_MEMORY),
    "again": ("x", *_MEMORY),  # nothing was kept: the forward's kernels run again
    "memory": _MEMORY,  # x is frozen, as in the first layer
    "value": ("visual_value",),
    "weights": ("x", "value"),  # PyTorch's products run for real even here: one weight, and few rows
    "shared": ("x", *SHARED),  # a factored memory that many calls read, added to the sums of the others
}


@dataclass(frozen=True)
class Case:
    """One problem and the tile forced on its launches.

    Attributes:
        form: "plain" memory, "factored", "text" (no memory) or "alone" (no FFN).
        full: with all that a call may add: biases, residual, positions, a float32 memory under 16 bits, an index, ragged lengths,
            dropout, and pre-activations and scores kept. Otherwise the least: inference on one image per sequence.
        packed: sequences end inside tiles.
        rank: r of a factored memory.
        tile: for the two large kernels and their backward, as accumulated columns; None: the cost model's own.
        aligned: False: odd sizes and strides, so that no operand has a descriptor and every tail is masked.
        turned: key and value lie the other way round, so that gate and key can't share a descriptor.
        activation: of FFN and memory; "": silu with a gate, erf's gelu without.
        backward: a key of `_NEEDS`, or "" for the forward.
        road: of `roads.ROADS`; the library's products run for real, so few rows. Gluon's, for Hopper alone, with tiles of its own.
    """

    dtype: torch.dtype
    precision: str
    form: str = "plain"
    gated: bool = True
    full: bool = True
    packed: bool = False
    sequences: int = 16
    length: int = 512
    rank: int = _RANK
    tile: Tile | None = None
    aligned: bool = True
    turned: bool = False
    activation: str = ""
    backward: str = ""
    road: str = "fused"

    @property
    def number(self) -> str:
        """One of `NUMBERS`."""
        return "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        words = [self.form, "gated" if self.gated else "ungated", "full" if self.full else "bare"]
        words += [word for word in ("packed", "turned") if getattr(self, word)]
        words += [f"in {self.tile.splits} parts"] if self.tile is not None and self.tile.splits > 1 else []
        words += [self.activation] if self.activation else []
        words += [] if self.road == "fused" else [self.road]
        words += [] if self.aligned else ["unaligned"]
        words += [f"rank {self.rank}"] if self.form == "factored" and self.rank != _RANK else []
        return f"{' '.join(words)} {self.sequences}x{self.length}" + (f", {self.backward}" if self.backward else "")


def cases(architecture: int, *, exhaustive: bool) -> Iterator[Case]:
    """What is compiled for one architecture.

    Args:
        exhaustive: every tile in every dtype, and each form that changes what is compiled; otherwise, of every kernel, the widest tile.
    """
    if not exhaustive:
        yield from _some_cases(architecture)
        return
    chip = tiles.chip_of(architecture)
    for dtype, precision in (
        (torch.bfloat16, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, "ieee"),
        (torch.float32, "ieee"),
    ):
        for aligned in (True, False):
            kind = (chip, dtype, precision)
            single = list(tiles.candidates(*kind, descriptors=aligned))
            double = list(tiles.candidates(*kind, descriptors=aligned, accumulators=2))
            case = Case(dtype, precision, aligned=aligned)
            if case.number != "float16" or aligned:
                yield from _by_tile(case, single, double)
            if case.number in ("bfloat16", "tf32"):
                yield from _by_form(case, single, double[0], architecture)


def _variant(case: Case, **changes: object) -> Case:
    return Case(**{**vars(case), **changes})  # type: ignore[arg-type]


def _by_tile(case: Case, single: list[Tile], double: list[Tile]) -> Iterator[Case]:
    """The fullest problem with every tile; float16 differs from bfloat16 in no form, only in its instructions."""
    for backward in ("", "kept"):
        for tile in single:
            yield _variant(case, tile=tile, backward=backward)
        if case.number == "float16":
            continue
        for tile in double:
            yield _variant(case, tile=tile, packed=True, length=500, backward=backward)
        # The core kernels' tiles go by the rows.
        for sequences, length in ((16, 512), (1, 512), (1, 128)) if case.aligned else ((16, 512),):
            yield _variant(case, form="factored", sequences=sequences, length=length, backward=backward)


def _by_form(case: Case, single: list[Tile], double: Tile, architecture: int) -> Iterator[Case]:
    """The other forms, most of them with the widest tile."""
    widest = single[0]
    yield _variant(case, tile=widest, full=False)
    yield _variant(case, tile=widest, full=False, backward="again")
    if not case.aligned:
        return
    for tile in single:  # without a gate the accumulator is one pre-activation, as wide as the tile
        yield _variant(case, tile=tile, gated=False)
    yield _variant(case, tile=widest, gated=False, backward="kept")
    yield _variant(case, form="text", tile=widest, sequences=1, length=16, backward="weights")
    for backward in ("", "kept"):
        for tile in single:
            yield _variant(case, tile=replace(tile, splits=4), backward=backward)
        yield _variant(case, tile=replace(double, splits=4), packed=True, length=500, backward=backward)
    for gated in (True, False):
        yield _variant(case, form="text", gated=gated, sequences=1, length=16, backward="kept", road="library")
    if case.number != "bfloat16":
        return
    if architecture == 90:
        yield from _by_gluon(case)
    yield _variant(case, tile=widest, full=False, gated=False)
    yield _variant(case, tile=double, full=False, packed=True, length=500)
    for form in ("text", "alone"):
        yield _variant(case, form=form, tile=widest)
        yield _variant(case, form=form, tile=widest, backward="kept")
    yield _variant(case, form="factored", full=False)
    for backward in ("memory", "value", "again", "shared"):
        yield _variant(case, form="factored", backward=backward)
    for backward in ("memory", "value"):
        yield _variant(case, tile=widest, backward=backward)
    for tile in dict.fromkeys((widest, double)):
        yield _variant(case, tile=tile, turned=True)
        yield _variant(case, tile=tile, turned=True, backward="kept")
    for rank in (48, 300):
        yield _variant(case, form="factored", rank=rank)
        yield _variant(case, form="factored", rank=rank, backward="kept")
        yield _variant(case, form="factored", rank=rank, backward="shared")


def _by_gluon(case: Case) -> Iterator[Case]:
    """Every form of the Gluon kernels with either of their tiles, in either number type."""
    for dtype, tile in itertools.product((torch.bfloat16, torch.float16), ring_tiles.TILES["gluon"]):
        given = _variant(case, dtype=dtype, tile=tile, road="gluon")
        for backward in ("", "kept"):
            for form, gated, turned in (("plain", True, False), ("plain", False, True), ("factored", True, True)):
                yield _variant(given, form=form, gated=gated, turned=turned, backward=backward)
            yield _variant(given, form="factored", backward=backward)
            for gated, activation in itertools.product((True, False), ("relu", "gelu", "gelu_tanh", "silu")):
                yield _variant(given, form="factored", gated=gated, activation=activation, backward=backward)
        yield _variant(given, form="alone", full=False)
        yield _variant(given, full=False)
        yield _variant(given, full=False, backward="again")
        yield _variant(given, form="factored", backward="memory")


def _some_cases(architecture: int) -> Iterator[Case]:
    chip, case = tiles.chip_of(architecture), Case(torch.bfloat16, "ieee")
    kind = {"chip": chip, "dtype": case.dtype, "precision": case.precision, "descriptors": True}
    widest = next(tiles.candidates(**kind))  # type: ignore[arg-type]
    for backward in ("", "kept"):
        yield _variant(case, tile=widest, backward=backward)
        yield _variant(case, form="factored", backward=backward)
    yield _variant(case, form="text", tile=widest, sequences=1, length=16, backward="weights")
    yield _variant(case, tile=widest, full=False)
    yield _variant(case, tile=replace(widest, splits=4), sequences=1)
    yield _variant(case, form="text", sequences=1, length=16, backward="kept", road="library")
    if architecture == 90:
        for backward in ("", "kept"):
            yield _variant(case, form="factored", backward=backward, road="gluon")
        yield _variant(case, form="factored", backward="shared")
        double = next(tiles.candidates(**kind, accumulators=2))  # type: ignore[arg-type]
        yield _variant(case, tile=double, packed=True, length=500)
        yield Case(torch.float32, "tf32", tile=next(tiles.candidates(chip, torch.float32, "tf32", descriptors=True)))


def launches(case: Case, architecture: int) -> list[Compiled]:
    """Compile every launch of the case."""
    problem = problem_of(case)
    known = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    try:
        tile = _gluon if case.road == "gluon" else _forced
        with tile(case.tile), offline(architecture) as launched, forced(case.road):
            if case.backward:
                pre = scores = None
                if case.backward != "again":
                    pre = problem.x.new_empty(1 + problem.gated, problem.rows, problem.pairs) if problem.pairs else None
                    scores = problem.x.new_empty(problem.rows, problem.slots) if problem.slots else None
                needs = frozenset(n for n in _NEEDS[case.backward] if getattr(problem, n) is not None)
                sums = {n: torch.empty(getattr(problem, n).shape) for n in needs.intersection(SHARED)}
                backend.backward(problem, torch.empty_like(problem.x), pre, scores, needs, sums)
            else:
                backend.forward(problem, save_hidden=case.full, save_scores=case.full)
    finally:
        torch.set_float32_matmul_precision(known)
    return launched


@contextlib.contextmanager
def _forced(tile: Tile | None) -> Iterator[None]:
    if tile is None:
        yield
        return

    def hidden(_: object, shape: Shape) -> Tile:
        return Tile(tile.block_n, tile.columns // shape.branches, tile.block_k, tile.warps, tile.stages)

    with (
        mock.patch.object(tiles, "hidden_tile", hidden),
        mock.patch.object(tiles, "output_tile", return_value=tile),
    ):
        yield


@contextlib.contextmanager
def _gluon(tile: Tile | None) -> Iterator[None]:
    from memvp_kernels.backends.triton.hopper import steps

    if tile is None:
        yield
        return
    with mock.patch.object(steps, "ring_tile", return_value=tile):
        yield


def problem_of(case: Case) -> Problem:
    """The case's problem; its tensors hold whatever the allocator left there."""
    rows, odd = case.sequences * case.length, 0 if case.aligned else 1
    width, pairs, slots = _WIDTH + odd, _PAIRS + odd, _SLOTS + odd
    factored, memory = case.form == "factored", case.form != "text"
    ffn, wide = case.form != "alone", torch.float32 if case.full else case.dtype

    def empty(*shape: int, dtype: torch.dtype = case.dtype, turned: bool = False) -> Tensor:
        if turned:
            return torch.empty(*shape[::-1], dtype=dtype).T
        return torch.empty(*shape, dtype=dtype)

    def if_(wanted: bool, *shape: int, dtype: torch.dtype = case.dtype, turned: bool = False) -> Tensor | None:
        return empty(*shape, dtype=dtype, turned=turned) if wanted else None

    def integers(wanted: bool, count: int) -> Tensor | None:
        return torch.empty(count, dtype=torch.int32) if wanted else None

    inner = case.rank + odd if factored else width
    biased = ffn and case.full
    activation = case.activation or ("silu" if case.gated else "gelu")
    dropped, several = memory and case.full, case.full and (case.sequences > 1 or factored)
    problem = Problem(
        x=empty(rows, width), residual=if_(case.full, rows, width),
        key=if_(ffn, pairs, width, turned=case.turned), value=if_(ffn, pairs, width, turned=not case.turned),
        gate=if_(ffn and case.gated, pairs, width),
        key_bias=if_(biased, pairs, dtype=torch.float32), gate_bias=if_(biased and case.gated, pairs, dtype=torch.float32),
        value_bias=if_(biased, width, dtype=torch.float32),
        visual_key=if_(memory, case.sequences, slots, inner, dtype=wide), visual_value=if_(memory, case.sequences, slots, inner, dtype=wide),
        visual_basis=if_(factored, case.rank + odd, width, dtype=wide),
        key_position=if_(memory and case.full, slots, width, dtype=wide), value_position=if_(memory and case.full, slots, width, dtype=wide),
        seed=torch.empty(1, dtype=torch.int64) if dropped else None,
        segments=Segments(
            rows=rows, sequences=case.sequences, length=None if case.packed else case.length,
            cu_seqlens=integers(case.packed, case.sequences + 1),
            index=integers(memory and several, case.sequences), lengths=integers(memory and several, case.sequences),
        ),
        activation=activation, visual_activation=activation,
        visual_scale=0.1, dropout_p=0.1 if dropped else 0.0,
    )  # fmt: skip
    return _joined(problem) if case.backward == "shared" else problem


def _joined(problem: Problem) -> Problem:
    """The same with its memory as :mod:`memvp_kernels.shared_memory` gives it: in x's dtype, basis and positions views of [W; p]."""
    assert problem.visual_key is not None
    rank, x = problem.rank, problem.x
    key, value = (x.new_empty(rank + problem.slots, problem.width) for _ in range(2))
    core = problem.visual_key.to(x.dtype)
    return replace(
        problem, visual_key=core, visual_value=core, visual_basis=key[:rank], key_position=key[rank:], value_position=value[rank:],
        key_operand=key, value_operand=value, segments=replace(problem.segments, lengths=None),
    )  # fmt: skip
