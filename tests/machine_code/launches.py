"""What is compiled: every kernel of the Triton backend, each tile that its cost model can return, in the forms a call can take.

A case is a problem of LLaMA-7B's shape on tensors that nobody fills, run through the backend's own forward or backward with one tile in
place of the cost model's choice, so the specialisations are the launchers' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton.gemm import override_implementation
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Tile
from memvp_kernels.backends.triton.runtime.offline import Compiled, offline
from memvp_kernels.feature_map import needs_of_backend
from memvp_kernels.hardware import chip_of
from memvp_kernels.problem import SHARED, Problem, Segments

__all__ = ["NUMBERS", "Case", "cases", "launches"]

#: How numbers are multiplied: x's dtype and float32's precision.
NUMBERS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
}
_WIDTH, _PAIRS, _SLOTS, _RANK = 4096, 11008, 320, 136
METHODS = {
    "": {},
    "adem": {"visual_activation": "identity", "visual_map": "silu", "visual_drop": 0.1},
    "dropped": {"visual_drop": 0.1},
}
_MEMORY = ("visual_key", "visual_value", "visual_basis", "key_position", "value_position")
#: What a backward is asked for, by name.
_NEEDS = {
    "kept": ("x", *_MEMORY),
    "again": ("x", *_MEMORY),  # nothing was kept: the forward's kernels run again
    "memory": _MEMORY,  # x is frozen, as in the first layer
    "value": ("visual_value",),
    "weights": ("x", "value"),
    "shared": ("x", *SHARED),  # a factored memory that many calls read, added to the sums of the others
}


@dataclass(frozen=True)
class Case:
    """One problem and the tile of its launches.

    Attributes:
        number: a key of `NUMBERS`.
        form: "plain" memory, "factored", "text" (no memory) or "alone" (no FFN).
        full: with all that a call may add: biases, residual, positions, a float32 memory under 16 bits, an index, ragged lengths,
            dropout, and pre-activations and scores kept. Otherwise the least: inference on one image per sequence.
        packed: sequences end inside tiles.
        rank: r of a factored memory.
        tile: for the two large kernels and their backward, as accumulated columns; None: the cost model's own.
        aligned: False: odd sizes and strides, so that no operand has a descriptor and every tail is masked.
        turned: key and value lie the other way round, so that gate and key can't share a descriptor.
        backward: a key of `_NEEDS`, or "" for the forward.
        implementation: of the large products.
        method: a key of `METHODS`, or "" for MemVP.
    """

    number: str
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
    backward: str = ""
    implementation: str = "fused"
    method: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of x and the weights."""
        return NUMBERS[self.number][0]

    @property
    def name(self) -> str:
        words = [*self.method.split(), self.form, "gated" if self.gated else "ungated", "full" if self.full else "bare"]
        words += [word for word in ("packed", "turned") if getattr(self, word)]
        words += [f"in {self.tile.splits} parts"] if self.tile is not None and self.tile.splits > 1 else []
        words += [] if self.implementation == "fused" else [self.implementation]
        words += [] if self.aligned else ["unaligned"]
        words += [f"rank {self.rank}"] if self.form == "factored" and self.rank != _RANK else []
        return f"{' '.join(words)} {self.sequences}x{self.length}" + (f", {self.backward}" if self.backward else "")


def cases(architecture: int, *, exhaustive: bool) -> Iterator[Case]:
    """What is compiled for one architecture.

    Args:
        exhaustive: every tile in every number type, and each form that changes what is compiled; otherwise each kernel's widest
            tile; where that is not Hopper, in the fullest forms alone.
    """
    if not exhaustive:
        yield from _widest(architecture)
        return
    for number, aligned in ((number, aligned) for number in NUMBERS for aligned in (True, False)):
        case = Case(number, aligned=aligned)
        single, double = _tiles(architecture, case), _tiles(architecture, case, accumulators=2)
        if number != "float16" or aligned:
            yield from _by_tile(case, single, double)
        if number in ("bfloat16", "tf32"):
            yield from _by_form(case, single, double[0])


def _tiles(architecture: int, case: Case, accumulators: int = 1) -> list[Tile]:
    chip, kind = chip_of(architecture), NUMBERS[case.number]
    return list(tiles.candidates(chip, *kind, descriptors=case.aligned, accumulators=accumulators))


def _by_tile(case: Case, single: list[Tile], double: list[Tile]) -> Iterator[Case]:
    """The fullest problem with every tile; float16 differs from bfloat16 in no form, only in its instructions."""
    for backward in ("", "kept"):
        for tile in single:
            yield replace(case, tile=tile, backward=backward)
        if case.number == "float16":
            continue
        for tile in double:
            yield replace(case, tile=tile, packed=True, length=500, backward=backward)
        # The core kernels' tiles go by the rows.
        for sequences, length in ((16, 512), (1, 512), (1, 128)) if case.aligned else ((16, 512),):
            yield replace(case, form="factored", sequences=sequences, length=length, backward=backward)


def _by_form(case: Case, single: list[Tile], double: Tile) -> Iterator[Case]:
    """The other forms, most of them with the widest tile."""
    widest = single[0]
    yield replace(case, tile=widest, full=False)
    yield replace(case, tile=widest, full=False, backward="again")
    if not case.aligned:
        return
    for tile in single:  # without a gate the accumulator is one pre-activation, as wide as the tile
        yield replace(case, tile=tile, gated=False)
    yield replace(case, tile=widest, gated=False, backward="kept")
    yield replace(case, form="text", tile=widest, sequences=1, length=16, backward="weights")
    for backward in ("", "kept"):
        for tile in single:
            yield replace(case, tile=replace(tile, splits=4), backward=backward)
        yield replace(case, tile=replace(double, splits=4), packed=True, length=500, backward=backward)
    for gated in (True, False):
        yield _cublas(case, gated=gated)
    if case.number != "bfloat16":
        return
    yield replace(case, tile=widest, full=False, gated=False)
    yield replace(case, tile=double, full=False, packed=True, length=500)
    for form in ("text", "alone"):
        yield replace(case, form=form, tile=widest)
        yield replace(case, form=form, tile=widest, backward="kept")
    yield replace(case, form="factored", full=False)
    for backward in ("memory", "value", "again", "shared"):
        yield replace(case, form="factored", backward=backward)
    for backward in ("memory", "value"):
        yield replace(case, tile=widest, backward=backward)
    for tile in dict.fromkeys((widest, double)):
        yield replace(case, tile=tile, turned=True)
        yield replace(case, tile=tile, turned=True, backward="kept")
    yield from _relatives(replace(case, tile=widest))
    for rank in (48, 300):
        for backward in ("", "kept", "shared"):
            yield replace(case, form="factored", rank=rank, backward=backward)


def _relatives(case: Case) -> Iterator[Case]:
    """Scores with launches of their own; the FFN's are those of text."""
    case = replace(case, gated=False)
    for backward in ("", "kept"):
        yield replace(case, form="factored", tile=None, method="adem", backward=backward)
    yield replace(case, form="alone", method="dropped")
    yield replace(case, form="alone", method="dropped", backward="memory")
    yield replace(case, form="factored", tile=None, method="dropped")


def _cublas(case: Case, gated: bool = True) -> Case:
    return replace(case, form="text", gated=gated, sequences=1, length=16, backward="kept", implementation="cublas")


def _widest(architecture: int) -> Iterator[Case]:
    case = Case("bfloat16")
    widest = _tiles(architecture, case)[0]
    yield replace(case, tile=widest)
    for backward in ("", "kept"):
        yield replace(case, form="factored", backward=backward)
    yield replace(case, form="alone", tile=widest, gated=False, method="dropped")
    if architecture != 90:
        return
    yield replace(case, tile=widest, backward="kept")
    yield replace(case, form="text", tile=widest, sequences=1, length=16, backward="weights")
    yield replace(case, tile=widest, full=False)
    yield replace(case, tile=replace(widest, splits=4), sequences=1)
    yield _cublas(case)
    yield replace(case, form="factored", backward="shared")
    yield replace(case, tile=_tiles(90, case, accumulators=2)[0], packed=True, length=500)
    yield replace(case, number="tf32", tile=_tiles(90, Case("tf32"))[0])
    yield from _relatives(replace(case, tile=widest))


def launches(case: Case, architecture: int) -> list[Compiled]:
    """Compile every launch of the case."""
    problem = _problem(case)
    known = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.number == "tf32" else "highest")
    try:
        with _with_tile(case.tile), override_implementation(case.implementation), offline(architecture) as launched:
            if case.backward:
                pre = scores = None
                if case.backward != "again":
                    pre = problem.x.new_empty(1 + problem.gated, problem.rows, problem.pairs) if problem.pairs else None
                    scores = problem.x.new_empty(problem.rows, problem.slots) if problem.slots else None
                needs = frozenset(n for n in _NEEDS[case.backward] if getattr(problem, n) is not None)
                needs = needs if problem.visual_map is None else needs_of_backend(needs)
                summed = needs.intersection(SHARED) if case.backward == "shared" else ()
                sums = {n: torch.empty(getattr(problem, n).shape) for n in summed}
                backend.backward(problem, torch.empty_like(problem.x), pre, scores, needs, sums)
            else:
                backend.forward(problem, save_hidden=case.full, save_scores=case.full)
    finally:
        torch.set_float32_matmul_precision(known)
    return launched


@contextlib.contextmanager
def _with_tile(tile: Tile | None) -> Iterator[None]:
    if tile is None:
        yield
        return

    def hidden(_: object, shape: Shape) -> Tile:
        return replace(tile, columns=tile.columns // shape.branches, splits=1)

    with (
        mock.patch.object(tiles, "hidden_tile", hidden),
        mock.patch.object(tiles, "output_tile", return_value=tile),
    ):
        yield


def _problem(case: Case) -> Problem:
    """The case's problem; its tensors hold whatever the allocator left there."""
    rows, odd = case.sequences * case.length, 0 if case.aligned else 1
    width, pairs, slots, rank = _WIDTH + odd, _PAIRS + odd, _SLOTS + odd, case.rank + odd
    factored, memory, ffn, full = case.form == "factored", case.form != "text", case.form != "alone", case.full
    wide, several = torch.float32 if full else case.dtype, full and (case.sequences > 1 or factored)

    def new(wanted: bool, *shape: int, dtype: torch.dtype = case.dtype, turned: bool = False) -> Tensor | None:
        if not wanted:
            return None
        return torch.empty(*shape[::-1], dtype=dtype).T if turned else torch.empty(*shape, dtype=dtype)

    x = new(True, rows, width)
    assert x is not None
    inner = rank if factored else width
    key_memory, value_memory = (new(memory, case.sequences, slots, inner, dtype=wide) for _ in range(2))
    key_position, value_position = (new(memory and full, slots, width, dtype=wide) for _ in range(2))
    activation = "silu" if case.gated else "gelu"
    problem = Problem(
        x=x, residual=new(full, rows, width),
        key=new(ffn, pairs, width, turned=case.turned), value=new(ffn, pairs, width, turned=not case.turned),
        gate=new(ffn and case.gated, pairs, width),
        key_bias=new(ffn and full, pairs, dtype=torch.float32), gate_bias=new(ffn and full and case.gated, pairs, dtype=torch.float32),
        value_bias=new(ffn and full, width, dtype=torch.float32),
        visual_key=key_memory, visual_value=value_memory, visual_basis=new(factored, rank, width, dtype=wide),
        key_position=key_position, value_position=value_position,
        seed=new(memory and full, 1, dtype=torch.int64),
        segments=Segments(
            rows=rows, sequences=case.sequences, length=None if case.packed else case.length,
            cu_seqlens=new(case.packed, case.sequences + 1, dtype=torch.int32),
            index=new(memory and several, case.sequences, dtype=torch.int32),
            lengths=new(memory and several, case.sequences, dtype=torch.int32),
        ),
        key_operand=new(case.method == "adem", case.sequences, slots, width),
        activation=activation, visual_scale=0.1, dropout_p=0.1 if memory and full else 0.0,
        **{"visual_activation": activation} | METHODS[case.method],
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
