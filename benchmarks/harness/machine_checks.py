"""What the machine code of a case's launches says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harness.machine_cases import Case, launches, problem_of
from harness.machine_code import Compiled, Machine, inspect
from memvp_kernels.backends.triton.device.operands import BY_POINTER
from memvp_kernels.backends.triton.heuristics import hopper_tiles as ring_tiles
from memvp_kernels.backends.triton.heuristics import tiles
from memvp_kernels.backends.triton.heuristics.cost_model import of_launch
from memvp_kernels.backends.triton.heuristics.shape import Shape
from memvp_kernels.backends.triton.heuristics.tiles import Chip, Tile

__all__ = ["GLUON_KERNELS", "KERNELS", "Row", "complaints", "rows"]

#: Every kernel of the backend for all architectures, with the arguments that bring a matrix product: it multiplies when one of them is there.
KERNELS: dict[str, tuple[str, ...]] = {
    "hidden_fwd_kernel": ("key", "memory"),
    "output_fwd_kernel": ("value", "memory"),
    "core_fwd_kernel": ("c",),
    "dhidden_bwd_kernel": ("value", "memory"),
    "dinput_bwd_kernel": ("key", "memory"),
    "dmemory_bwd_kernel": ("left",),
    "core_bwd_kernel": ("dscores", "THROUGH_KEY", "THROUGH_VALUE"),
    "form_memory_kernel": (),
    "form_hidden_kernel": (),
    "form_dpre_kernel": (),
    "add_parts_kernel": (),
}
#: Those for Hopper alone.
GLUON_KERNELS: dict[str, tuple[str, ...]] = {
    "gluon_hidden_kernel": ("key", "memory"),
    "gluon_output_kernel": ("right", "memory"),
    "gluon_dhidden_kernel": ("value", "memory"),
}
_TENSOR_MEMORY = 512  # columns of a multiprocessor


@dataclass(frozen=True)
class Row:
    """One launch of a case: what was compiled, and what its machine code says.

    Attributes:
        dtype: one of `machine_cases.NUMBERS`.
        rows, columns, block_k: of a tile of the product; 0 where there is none. A memory's gradient has slots for rows.
        multiplies: this launch has a matrix product.
        descriptors: its operands are read through TMA.
        grid: programs.
        waves: of one program per multiprocessor, or where programs stay of one tile.
        predicted: the cost model's time in µs, for the kernels that it describes; nobody measured it.
        machine: None when it did not compile, for the reason in `error`.
        moved: bytes of its operands, each once; what several tiles read again comes from L2.
        accumulated: columns of the one accumulator of a kernel that orders its wgmma itself; 0 where Triton does.
    """

    kernel: str
    case: str
    architecture: int
    dtype: str
    rows: int
    columns: int
    block_k: int
    stages: int
    multiplies: bool
    descriptors: bool
    grid: int
    waves: float
    predicted: float | None
    machine: Machine | None
    error: str = ""
    moved: int = 0
    accumulated: int = 0


def rows(case: Case, architecture: int, seen: set[str]) -> Iterator[Row]:
    """The case's launches, compiled and read; without those whose hash is in `seen`, where the new ones are added."""
    for launched in launches(case, architecture):
        known = launched.error or launched.kernel.hash
        if known not in seen:
            seen.add(known)
            yield _row(case, architecture, launched)


def _row(case: Case, architecture: int, launched: Compiled) -> Row:
    chip = tiles.chip_of(architecture)
    height = launched.constant("BLOCK_N", "BLOCK_M", "BLOCK_SLOTS")
    columns = launched.constant("BLOCK_F", "BLOCK_D", "BLOCK_U", "BLOCK_M", "BLOCK_COLUMNS", "BLOCK")
    block_k = launched.constant("BLOCK_K", "BLOCK_R")
    warps, stages = launched.constant("num_warps"), launched.constant("num_stages")
    machine = None
    if launched.kernel is not None:
        warps, stages = launched.kernel.metadata.num_warps, launched.kernel.metadata.num_stages
        machine = inspect(launched.kernel)
    stages = launched.constant("STAGES") or stages
    ours = launched.name in GLUON_KERNELS
    wide = columns * (1 + (launched.constants.get("gate") is not None)) if ours else 0
    tile = Tile(height, wide or columns, block_k, warps, stages, splits=launched.constant("SPLITS") or 1)
    count = launched.programs
    if ours:  # programs that stay, with several tiles each
        rows, across, _ = _ring(launched)
        count = -(-rows // height) * sum(-(-n // wide) for n in across)
    operands = [launched.constants.get(name) for name in {**KERNELS, **GLUON_KERNELS}[launched.name]]
    multiplies = any(operand is not None and operand is not False for operand in operands)
    return Row(
        kernel=launched.name, case=case.name, architecture=architecture, dtype=case.number, rows=height, columns=columns,
        block_k=block_k, stages=stages, multiplies=multiplies,
        descriptors=multiplies and (ours or launched.constant("FORM") != BY_POINTER.value), grid=launched.programs, waves=round(count / chip.multiprocessors, 2),
        predicted=_predicted(launched, case, chip, tile), machine=machine, error=launched.error, moved=launched.moved,
        accumulated=wide,
    )  # fmt: skip


def _predicted(launched: Compiled, case: Case, chip: Chip, tile: Tile) -> float | None:
    kernel, pairs, slots = launched.name, launched.constant("F"), launched.constant("M")
    if kernel in GLUON_KERNELS:
        cycles = ring_tiles.ring_cycles(chip, "gluon", tile, *_ring(launched))
        return round(cycles / (chip.clock * 1e3), 1)
    if not pairs or kernel.split("_")[0] not in ("hidden", "dhidden", "output", "dinput"):
        return None
    problem = problem_of(case)
    sequences = 1 if case.form == "factored" else case.sequences
    shape = of_launch(
        Shape(
            case.dtype, case.precision, problem.rows, problem.width, pairs, slots, sequences, problem.segments.length,
            gated=case.gated, descriptors=case.aligned,
        ),
        kernel.split("_")[0],
    )  # fmt: skip
    if "hidden" in kernel:
        cycles = tiles.hidden_cycles(chip, tile, shape, bool(launched.constant("PERSISTENT")))
    else:
        cycles = tiles.output_cycles(chip, tile, shape, case.packed)
    return round(cycles / (chip.clock * 1e3), 1)


def _ring(launched: Compiled) -> tuple[int, tuple[int, ...], int]:
    """Rows, columns and depth of a Gluon launch, as the cost model takes them."""
    rows, pairs, slots, width = (launched.constant(name) for name in ("N", "F", "M", "d"))
    if launched.name != "gluon_output_kernel":
        return rows, (pairs * (1 + (launched.constants.get("gate") is not None)), slots), width
    products = 1 + (launched.constants.get("second_right") is not None)
    return rows, (width,), products * pairs + slots


def complaints(row: Row) -> list[str]:
    """What is wrong with a kernel's machine code; empty when nothing is."""
    found = [f"does not compile: {row.error}"] if row.machine is None else list(_complaints(row, row.machine))
    what = f"sm_{row.architecture} {row.kernel} ({row.case}, {row.dtype}, {row.rows}x{row.columns}x{row.block_k})"
    return [f"{what}: {f}" for f in found]


def _complaints(row: Row, machine: Machine) -> Iterator[str]:
    chip = tiles.chip_of(row.architecture)
    if machine.stack or machine.spills:
        yield f"spills: {machine.stack} bytes of stack, {machine.spills} loads and stores"
    if machine.shared > chip.shared:
        yield f"{machine.shared} bytes of shared memory, the chip has {chip.shared} per block"
    if machine.tensor_memory > _TENSOR_MEMORY:
        yield f"{machine.tensor_memory} columns of tensor memory, the chip has {_TENSOR_MEMORY}"
    wanted = _instruction(row, chip)
    wrong = [operation for operation in machine.matrix if not wanted or not _is(operation, wanted, row.dtype)]
    if wrong or (wanted and not machine.matrix):
        yield f"wanted {wanted or 'no matrix instruction'}, found {', '.join(wrong) or 'no matrix instruction at all'}"
    if wanted == "HGMMA" and not machine.loops:
        yield "no loop has a wgmma in it, so nothing says whether they overlap"
    if any(loop.serialised for loop in machine.loops):
        yield "its wgmma are serialised: each waits for the one before"
    if row.architecture >= 90 and not machine.follows:
        yield "it may begin while the launch before it runs, and does not wait for it before it touches memory"
    if row.accumulated and any(loop.depth == 0 for loop in machine.loops):
        yield "a step's products are awaited before the next begins"
    narrow = [o for o in machine.matrix if row.accumulated and o.split(".")[1:2] != [f"64x{row.accumulated}x16"]]
    if narrow:
        yield f"wanted one instruction for all {row.accumulated} columns, found {', '.join(narrow)}"
    if row.descriptors and not machine.tensor_loads:
        yield "its operands have descriptors, and nothing is loaded through TMA"


def _instruction(row: Row, chip: Chip) -> str:
    """The matrix instruction of every product of this kernel, by what it multiplies and never by what was found; "" for none."""
    if not row.multiplies or row.dtype == "float32":  # IEEE float32 has no matrix instruction
        return ""
    # wgmma and tcgen05 need 64 rows.
    return {"wgmma": "HGMMA", "tcgen05": "UTCHMMA"}.get(chip.family, "HMMA") if row.rows >= 64 else "HMMA"


def _is(operation: str, wanted: str, dtype: str) -> bool:
    """HGMMA.64x256x16.F32.BF16, HMMA.1688.F32.TF32, HMMA.16816.F32 (of float16), UTCHMMA: which types it multiplies is a suffix."""
    base, *words = operation.split(".")
    suffix = {"bfloat16": "BF16", "tf32": "TF32"}.get(dtype)
    typed = {"BF16", "TF32"}.intersection(words)
    return base == wanted and (wanted == "UTCHMMA" or typed == ({suffix} if suffix else set()))
