"""Every kernel of the Triton backend with every tile its cost model can return, compiled offline: the cases of machine_report.py.

A case is a problem of LLaMA-7B's shape on tensors that nobody fills, run through the backend's own forward or backward with one tile in
place of the cost model's choice. What it launches is compiled as it would be on that GPU, and read back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from harness.machine_code import Compiled, Machine, inspect, offline
from memvp_kernels.backends import triton as backend
from memvp_kernels.backends.triton import tiles
from memvp_kernels.backends.triton.tiles import Chip, Tile
from memvp_kernels.problem import Problem, Segments

__all__ = ["Case", "Row", "cases", "complaints", "run"]

_WIDTH, _PAIRS, _SLOTS, _RANK = 4096, 11008, 320, 136
_TRAINED = frozenset(("x", "visual_key", "visual_value", "visual_basis", "key_position", "value_position"))


@dataclass(frozen=True)
class Case:
    """One problem and the tile forced on its launches.

    Attributes:
        form: "plain" memory, "factored" or "packed" (plain, with sequences that end inside tiles).
        length: T.
        tile: for the two large kernels and their backward, as accumulated columns; None: the cost model's own.
        aligned: False: odd strides, so that no operand has a descriptor.
    """

    dtype: torch.dtype
    precision: str
    form: str
    gated: bool
    sequences: int
    length: int
    tile: Tile | None
    aligned: bool = True
    backward: bool = False

    @property
    def name(self) -> str:
        ffn = "gated" if self.gated else "biased"
        rows = f"{self.sequences}x{self.length}"
        return f"{self.form}, {ffn}, {rows}" + ("" if self.aligned else ", unaligned")


@dataclass(frozen=True)
class Row:
    """One launch of a case: what was compiled, and what its machine code says.

    Attributes:
        grid: programs.
        waves: of one program per multiprocessor.
        predicted: the cost model's time in µs, for the kernels that it describes; nobody measured it.
    """

    kernel: str
    case: str
    architecture: int
    dtype: str
    block_n: int
    columns: int
    block_k: int
    stages: int
    grid: int
    waves: float
    predicted: float | None
    machine: Machine


def cases(architecture: int, *, exhaustive: bool) -> Iterator[Case]:
    """What is compiled for one architecture.

    Args:
        exhaustive: every tile in every dtype; otherwise 16 bits with the widest tile, and of the rarer forms only Hopper's.
    """
    if not exhaustive:
        yield from _some_cases(architecture)
        return
    chip = tiles.chip_of(architecture)
    kinds = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]
    for dtype, precision in kinds:
        for aligned in (True, False) if architecture >= 90 else (True,):
            descriptors = aligned and architecture >= 90
            single = list(tiles.candidates(chip, dtype, precision, descriptors=descriptors))
            double = list(tiles.candidates(chip, dtype, precision, descriptors=descriptors, accumulators=2))
            for backward in (False, True):
                for tile in single:
                    yield Case(dtype, precision, "plain", True, 16, 512, tile, aligned, backward)
                    yield Case(dtype, precision, "plain", False, 16, 512, tile, aligned, backward)
                for tile in double:
                    yield Case(dtype, precision, "packed", True, 16, 500, tile, aligned, backward)
                for sequences in (1, 2, 16):
                    yield Case(dtype, precision, "factored", True, sequences, 512, None, aligned, backward)


def _some_cases(architecture: int) -> Iterator[Case]:
    chip, dtype = tiles.chip_of(architecture), torch.bfloat16
    widest = next(tiles.candidates(chip, dtype, "ieee", descriptors=architecture >= 90))
    yield Case(dtype, "ieee", "plain", True, 16, 512, widest)
    yield Case(dtype, "ieee", "plain", True, 16, 512, widest, backward=True)
    yield Case(dtype, "ieee", "factored", True, 16, 512, None)
    if architecture == 90:
        two = next(tiles.candidates(chip, dtype, "ieee", descriptors=True, accumulators=2))
        yield Case(dtype, "ieee", "plain", False, 16, 512, widest)
        yield Case(dtype, "ieee", "packed", True, 16, 500, two)
        yield Case(dtype, "ieee", "factored", True, 16, 512, None, backward=True)


def run(case: Case, architecture: int) -> list[Row]:
    """Compile and read every launch of the case."""
    problem = _problem(case)
    known = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    try:
        with _forced(case.tile), offline(architecture) as launches:
            if case.backward:
                rows, pairs = problem.rows, problem.pairs
                pre = problem.x.new_empty(1 + problem.gated, rows, pairs)
                scores = problem.x.new_empty(rows, problem.slots)
                backend.backward(problem, torch.empty_like(problem.x), pre, scores, _TRAINED & _given(problem))
            else:
                backend.forward(problem, save_hidden=True, save_scores=True)
    finally:
        torch.set_float32_matmul_precision(known)
    return [_row(case, problem, architecture, launched) for launched in launches]


def _row(case: Case, problem: Problem, architecture: int, launched: Compiled) -> Row:
    chip, metadata = tiles.chip_of(architecture), launched.kernel.metadata
    columns = launched.constant("BLOCK_F", "BLOCK_D", "BLOCK_U", "BLOCK_M")
    block_n, block_k = launched.constant("BLOCK_N"), launched.constant("BLOCK_K", "BLOCK_R")
    tile = Tile(block_n, columns, block_k, metadata.num_warps, metadata.num_stages)
    return Row(
        kernel=launched.name, case=case.name, architecture=architecture, dtype=str(case.dtype).removeprefix("torch."),
        block_n=block_n, columns=columns, block_k=block_k, stages=tile.stages, grid=launched.programs,
        waves=round(launched.programs / chip.multiprocessors, 2), predicted=_predicted(launched, case, problem, chip, tile),
        machine=inspect(launched.kernel),
    )  # fmt: skip


def _predicted(launched: Compiled, case: Case, problem: Problem, chip: Chip, tile: Tile) -> float | None:
    kernel, pairs, slots = launched.name, launched.constant("F"), launched.constant("M")
    if not pairs or kernel.split("_")[0] not in ("hidden", "dhidden", "output", "dinput"):
        return None
    sequences = 1 if case.form == "factored" else case.sequences
    size = (case.dtype, case.precision, problem.rows, problem.width)
    if "hidden" in kernel:
        gated = case.gated and kernel.startswith("hidden")
        cycles = tiles.hidden_cycles(chip, tile, *size, pairs, slots, sequences, gated)
    else:
        both = 1 + (case.gated and kernel.startswith("dinput"))
        cycles = tiles.output_cycles(chip, tile, *size, both * pairs, slots, sequences, case.form == "packed")
    return round(cycles / (chip.clock * 1e3), 1)


def complaints(row: Row) -> list[str]:
    """What is wrong with a kernel's machine code; empty when nothing is."""
    chip, machine = tiles.chip_of(row.architecture), row.machine
    found = []
    if machine.stack or machine.spills:
        found.append(f"spills: {machine.stack} bytes of stack, {machine.spills} loads and stores")
    if machine.shared > chip.shared:
        found.append(f"{machine.shared} bytes of shared memory, the chip has {chip.shared} per block")
    wanted = _instruction(row, chip)
    if wanted and not any(operation.startswith(wanted) for operation in machine.matrix):
        found.append(f"no {wanted}, only {machine.matrix or 'no matrix instruction at all'}")
    if any(loop.serialised for loop in machine.loops if wanted == "HGMMA"):
        found.append("its wgmma are serialised: each waits for the one before")
    return [
        f"sm_{row.architecture} {row.kernel} ({row.case}, {row.dtype}, {row.block_n}x{row.columns}x{row.block_k}): {f}"
        for f in found
    ]


def _instruction(row: Row, chip: Chip) -> str:
    """The matrix instruction that this launch should use; wgmma and tcgen05 need 64 rows, IEEE float32 has none."""
    if not row.block_n or not any(k in row.kernel for k in ("hidden", "output", "dinput", "dmemory", "core")):
        return ""
    if row.dtype == "float32" and not any("TF32" in operation for operation in row.machine.matrix):
        return ""
    return {"wgmma": "HGMMA", "tcgen05": "UTC"}.get(chip.family, "HMMA") if row.block_n >= 64 else ""


def _given(problem: Problem) -> frozenset[str]:
    return frozenset(n for n in _TRAINED if getattr(problem, n) is not None)


@contextlib.contextmanager
def _forced(tile: Tile | None) -> Iterator[None]:
    if tile is None:
        yield
        return

    def hidden(*_: object, gated: bool, **__: object) -> Tile:
        return Tile(tile.block_n, tile.columns // (1 + gated), tile.block_k, tile.warps, tile.stages)

    with (
        mock.patch.object(tiles, "hidden_tile", hidden),
        mock.patch.object(tiles, "output_tile", return_value=tile),
    ):
        yield


def _problem(case: Case) -> Problem:
    dtype, rows, packed = case.dtype, case.sequences * case.length, case.form == "packed"

    def empty(*shape: int) -> Tensor:
        if case.aligned:
            return torch.empty(*shape, dtype=dtype)
        return torch.empty(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1]

    factored = case.form == "factored"
    inner = _RANK if factored else _WIDTH
    # Only the plain FFN has biases: BART's; the gated ones have none, LLaMA's.
    biases = None if case.gated else torch.empty(_PAIRS, dtype=torch.float32)
    return Problem(
        x=empty(rows, _WIDTH), key=empty(_PAIRS, _WIDTH), value=empty(_WIDTH, _PAIRS).T,
        gate=empty(_PAIRS, _WIDTH) if case.gated else None, key_bias=biases, gate_bias=None,
        value_bias=None if case.gated else torch.empty(_WIDTH, dtype=torch.float32),
        visual_key=empty(case.sequences, _SLOTS, inner), visual_value=empty(case.sequences, _SLOTS, inner),
        visual_basis=empty(_RANK, _WIDTH) if factored else None,
        key_position=empty(_SLOTS, _WIDTH) if factored else None, value_position=empty(_SLOTS, _WIDTH) if factored else None,
        residual=None if case.gated else empty(rows, _WIDTH), seed=torch.empty(1, dtype=torch.int64),
        segments=Segments(
            rows=rows, sequences=case.sequences, length=None if packed else case.length,
            cu_seqlens=torch.empty(case.sequences + 1, dtype=torch.int32) if packed else None,
        ),
        activation="silu" if case.gated else "gelu", visual_activation="silu" if case.gated else "gelu",
        visual_scale=0.1, dropout_p=0.1,
    )  # fmt: skip
