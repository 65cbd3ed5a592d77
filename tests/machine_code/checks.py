"""What is wrong with the machine code of a launch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memvp_kernels.backends.triton.device.operands import POINTER
from memvp_kernels.backends.triton.runtime.offline import Compiled
from memvp_kernels.hardware import chip_of
from tests.machine_code import sass
from tests.machine_code.launches import Case
from tests.machine_code.sass import Kernel

__all__ = ["KERNELS", "Row", "complaints", "row_of"]

#: Every kernel of the backend with the arguments that bring a matrix product: it multiplies when one of them is there.
KERNELS: dict[str, tuple[str, ...]] = {
    "hidden_fwd_kernel": ("key", "memory"),
    "output_fwd_kernel": ("value", "memory"),
    "core_fwd_kernel": ("c",),
    "dhidden_bwd_kernel": ("value", "memory"),
    "dinput_bwd_kernel": ("key", "memory"),
    "dmemory_bwd_kernel": ("left",),
    "drop_fwd_kernel": (),
    "core_bwd_kernel": ("dscores", "THROUGH_KEY", "THROUGH_VALUE"),
    "materialise_memory_kernel": (),
    "activation_fwd_kernel": (),
    "activation_bwd_kernel": (),
    "reduce_splits_kernel": (),
}
_TENSOR_MEMORY = 512  # columns of a multiprocessor


@dataclass(frozen=True)
class Row:
    """One launch of a case and its machine code.

    Attributes:
        dtype: one of `launches.NUMBERS`.
        tile: rows, columns and step of the product; 0 where there is none. A memory's gradient has slots for rows.
        multiplies: this launch has a matrix product.
        descriptors: its operands are read through TMA.
        machine: None when it did not compile, for the reason in `error`.
        shared, tensor_memory, pdl: of the launch: bytes, columns, and whether it may begin before the one before it ends.
    """

    kernel: str
    case: str
    architecture: int
    dtype: str
    tile: tuple[int, int, int]
    multiplies: bool
    descriptors: bool
    machine: Kernel | None
    shared: int = 0
    tensor_memory: int = 0
    pdl: bool = False
    error: str = ""


def row_of(case: Case, architecture: int, launched: Compiled) -> Row:
    """The launch with its cubin read."""
    tile = (
        launched.constant("BLOCK_N", "BLOCK_M", "BLOCK_SLOTS"),
        launched.constant("BLOCK_F", "BLOCK_D", "BLOCK_U", "BLOCK_M", "BLOCK_COLUMNS", "BLOCK"),
        launched.constant("BLOCK_K", "BLOCK_R"),
    )
    operands = [launched.arguments.get(name) for name in KERNELS[launched.name]]
    multiplies = any(operand is not None and operand is not False for operand in operands)
    descriptors = multiplies and launched.constant("LOAD") != POINTER.value
    what = (launched.name, case.name, architecture, case.number, tile, multiplies, descriptors)
    if launched.kernel is None:
        return Row(*what, machine=None, error=launched.error)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(launched.kernel.asm["cubin"])
        (machine,) = sass.kernels(cubin)
    metadata = launched.kernel.metadata
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    return Row(*what, machine, metadata.shared, tensor_memory, metadata.launch_pdl)


def complaints(row: Row) -> list[str]:
    """What is wrong with a kernel's machine code; empty when nothing is."""
    found = [f"does not compile: {row.error}"] if row.machine is None else list(_complaints(row, row.machine))
    what = f"sm_{row.architecture} {row.kernel} ({row.case}, {row.dtype}, {'x'.join(map(str, row.tile))})"
    return [f"{what}: {f}" for f in found]


def _complaints(row: Row, machine: Kernel) -> Iterator[str]:
    chip = chip_of(row.architecture)
    if machine.stack or machine.spills:
        yield f"spills: {machine.stack} bytes of stack, {machine.spills} loads and stores"
    if row.shared > chip.shared_memory:
        yield f"{row.shared} bytes of shared memory, the chip has {chip.shared_memory} per block"
    if row.tensor_memory > _TENSOR_MEMORY:
        yield f"{row.tensor_memory} columns of tensor memory, the chip has {_TENSOR_MEMORY}"
    wanted = _instruction(row, chip.family)
    wrong = [opcode for opcode in machine.matrix if not wanted or not _is(opcode, wanted, row.dtype)]
    if wrong or (wanted and not machine.matrix):
        yield f"wanted {wanted or 'no matrix instruction'}, found {', '.join(wrong) or 'no matrix instruction at all'}"
    if wanted == "HGMMA" and not machine.loops:
        yield "no loop has a wgmma in it, so nothing says whether they overlap"
    if any(loop.serialised for loop in machine.loops):
        yield "its wgmma are serialised: each waits for the one before"
    if chip.has_pdl and not (row.pdl and machine.waits_first):
        yield "it may begin while the launch before it runs, and does not wait for it before it touches memory"
    if row.descriptors and not machine.count("UTMALDG"):
        yield "its operands have descriptors, and nothing is loaded through TMA"


def _instruction(row: Row, family: str) -> str:
    """The matrix instruction of every product of this kernel, by what it multiplies and never by what was found; "" for none."""
    if not row.multiplies or row.dtype == "float32":  # IEEE float32 has no matrix instruction
        return ""
    # wgmma and tcgen05 need 64 rows.
    return {"wgmma": "HGMMA", "tcgen05": "UTCHMMA"}.get(family, "HMMA") if row.tile[0] >= 64 else "HMMA"


def _is(opcode: str, wanted: str, dtype: str) -> bool:
    """HGMMA.64x256x16.F32.BF16, HMMA.1688.F32.TF32, HMMA.16816.F32 (of float16), UTCHMMA: a suffix says which types it multiplies."""
    base, *words = opcode.split(".")
    suffix = {"bfloat16": "BF16", "tf32": "TF32"}.get(dtype)
    typed = {"BF16", "TF32"}.intersection(words)
    return base == wanted and (wanted == "UTCHMMA" or typed == ({suffix} if suffix else set()))
