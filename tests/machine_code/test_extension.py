"""What nvcc made of the kernels, for every architecture in the library: no spill, wide loads, tensor cores. Needs no GPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.machine_code import sass
from tests.machine_code.sass import Kernel

BLOCK_THREADS = 256
REGISTERS = 65536  # of one multiprocessor, on every chip since sm_80
#: A kernel of this package has hundreds of instructions; one whose body was guarded out has a handful, and does nothing.
FEWEST_INSTRUCTIONS = 200

Code = dict[str, dict[str, Kernel]]


@pytest.fixture(scope="module")
def every(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Code:
    """Kernels by architecture and name."""
    files = sass.cubins(library, tmp_path_factory.mktemp("cubins"))
    return {
        architecture: {kernel.name: kernel for cubin in found for kernel in sass.kernels(cubin)}
        for architecture, found in files.items()
    }


@pytest.fixture(scope="module")
def code(every: Code) -> Code:
    """The decode kernels, which are there for all architectures."""
    return {architecture: {n: k for n, k in found.items() if STEP not in n} for architecture, found in every.items()}


@pytest.fixture(scope="module")
def steps(every: Code) -> dict[str, Kernel]:
    """The steps' kernels for Hopper."""
    return {name: kernel for name, kernel in every["sm_90a"].items() if STEP in name}


def each(code: Code, pattern: str = "") -> list[tuple[str, Kernel]]:
    """(what to call it in a message, kernel) of all kernels whose name matches; there must be some for each architecture."""
    found = []
    for architecture, kernels in code.items():
        matching = [kernel for name, kernel in kernels.items() if re.search(pattern, name)]
        assert matching, f"{architecture}: no kernel matches {pattern}"
        found += [(f"{architecture} {kernel.name}", kernel) for kernel in matching]
    return found


# Of the mangled names: hidden_kernel<T, kTokenTiles>, values_kernel<T, kTokenTiles, kAcross>, finish_kernel<T, kBy16>,
# cooperative_kernel<T, kTokenTiles>.
BFLOAT16, FLOAT16 = "8BFloat16", "7Float16"
#: ffn_gemm_kernel<T, GemmKind, kGated>.
STEP, HIDDEN, OUTPUT, DHIDDEN = "ffn_gemm_kernel", "GemmKindE0", "GemmKindE1", "GemmKindE2"
PIPELINE = r"(hidden|values)_kernelI\w+Li[1-9]E"
SLOW = r"(hidden_kernelI\w+Li0EE|values_kernelI\w+Li0ELb0E|finish_kernelI\w+Lb0E)"


def test_every_architecture_is_there(library: Path, built_extension: ModuleType, code: Code) -> None:
    targets = built_extension.archs.split(";")
    assert set(code) == {f"sm_{target}" for target in targets if "+PTX" not in target}
    assert sass.ptx_targets(library) == {f"sm_{t.removesuffix('+PTX')}" for t in targets if "+PTX" in t}


def test_every_architecture_has_every_kernel(library: Path, code: Code, tmp_path: Path) -> None:
    names = [set(kernels) for kernels in code.values()]
    assert all(found == names[0] for found in names)
    assert sass.ptx_kernels(library, tmp_path) == names[0]
    for kernel in ("hidden_kernel", "values_kernel", "finish_kernel", "cooperative_kernel"):
        for number in (BFLOAT16, FLOAT16):
            assert any(kernel in name and number in name for name in names[0]), (kernel, number)


def test_no_kernel_is_empty(every: Code) -> None:
    for what, kernel in each(every):
        padding = kernel.count("NOP") + kernel.count("BRA")
        assert sum(kernel.opcodes.values()) - padding > FEWEST_INSTRUCTIONS, what
        assert kernel.count("STG") + kernel.count("UTMASTG") > 0, f"{what} stores nothing"


def test_no_kernel_spills(every: Code) -> None:
    for what, kernel in each(every):
        spills = kernel.count("STL"), kernel.count("LDL")
        assert (kernel.stack, kernel.local, spills) == (0, 0, (0, 0)), (
            f"{what} spills, with {kernel.registers} registers"
        )


def test_two_blocks_fit_a_multiprocessor(code: Code) -> None:
    """While one block drains its pipeline, the next launch's fills its own."""
    for what, kernel in each(code, PIPELINE):
        assert 2 * BLOCK_THREADS * kernel.registers <= REGISTERS, f"{what} has {kernel.registers} registers"


def test_weights_are_read_16_bytes_at_a_time(code: Code) -> None:
    for what, kernel in each(code, f"{PIPELINE}|cooperative_kernel"):
        assert kernel.count("LDGSTS", "128") > 0, f"{what}: no asynchronous 16-byte copy"
        assert kernel.count("LDGSTS") == kernel.count("LDGSTS", "128"), f"{what}: narrower asynchronous copies"
    for architecture, kernels in code.items():
        for name, kernel in kernels.items():
            if not re.search(f"{PIPELINE}|{SLOW}", name):
                assert kernel.count("LDG", "128") > 0, f"{architecture} {name}: no 16-byte load"


def test_shared_memory_is_read_by_matrices(code: Code) -> None:
    for what, kernel in each(code, f"{PIPELINE}|cooperative_kernel"):
        assert kernel.count("LDSM") > 0, f"{what}: no ldmatrix"
    for what, kernel in each(
        code, r"(values|cooperative)_kernelI\w+Li[1-9]E"
    ):  # an image's rows run across, value's may
        assert kernel.count("LDSM", "MT88") > 0, f"{what}: no ldmatrix.trans"


def test_launches_overlap_where_the_chip_can(code: Code) -> None:
    """Without the wait a kernel that begins early reads what is not there yet; no sm_80 has it, and none begins early."""
    for architecture in code:
        one = {architecture: code[architecture]}
        for pattern, opcode in (("(hidden|values)_kernel", "PREEXIT"), ("(values|finish)_kernel", "ACQBULK")):
            for what, kernel in each(one, pattern):
                assert (kernel.count(opcode) > 0) == (architecture != "sm_80"), f"{what}: {opcode}"
        for what, kernel in each(one, "hidden_kernel"):
            assert kernel.count("ACQBULK") == 0, f"{what} waits, and nothing of the step is before it"


def test_one_launch_meets_by_atomics_and_fences(code: Code) -> None:
    """A barrier of all blocks: each adds itself to a counter, behind a fence, and reads it until all have."""
    for what, kernel in each(code, "cooperative_kernel"):
        assert kernel.count("ACQBULK") == 0, f"{what} waits for a launch of the step, and there is none"
        assert kernel.count("ATOMG") + kernel.count("ATOM") > 0, f"{what}: no atomic"
        assert kernel.count("MEMBAR") >= 2, f"{what}: no fence"


@pytest.mark.parametrize(("number", "suffix"), [(BFLOAT16, {"BF16"}), (FLOAT16, set())], ids=["bf16", "fp16"])
def test_products_run_on_tensor_cores(code: Code, number: str, suffix: set[str]) -> None:
    for what, kernel in each(code, rf"(hidden|values|cooperative)_kernelI\w*{number}"):
        products = [opcode.split(".") for opcode in kernel.opcodes if opcode.startswith("HMMA")]
        assert products, f"{what}: no tensor-core instruction"
        for _, *modifiers in products:
            assert {"16816", "F32"} <= set(modifiers), f"{what}: {modifiers}"
            assert {"BF16"} & set(modifiers) == suffix, f"{what}: {modifiers}"


def test_hopper_alone_has_the_steps(every: Code, steps: dict[str, Kernel]) -> None:
    assert all(not any(STEP in name for name in found) for chip, found in every.items() if chip != "sm_90a")
    for number in (BFLOAT16, FLOAT16):
        forms = [(HIDDEN, "Lb0"), (HIDDEN, "Lb1"), (OUTPUT, "Lb0"), (DHIDDEN, "Lb0"), (DHIDDEN, "Lb1")]
        for kind, gated in forms:
            assert sum(number in name and f"{kind}E{gated}" in name for name in steps) == 1, (number, kind, gated)
    assert len(steps) == 10


def test_steps_multiply_the_widest_and_are_not_serialised(steps: dict[str, Kernel]) -> None:
    """Four products of 64 x 256 x 16 a step, of which the last one ends their group; in the loop one group goes on."""
    for what, kernel in steps.items():
        suffix = ".BF16" if BFLOAT16 in what else ""
        assert all(re.match(rf"HGMMA\.64x256x16\.F32{suffix} ", product) for product in kernel.products), what
        # Along k alone, or in a loop with a choice of the two ways in which right operands lie.
        ways = 1 if HIDDEN in what else 2
        ends = ["gsb0" in product for product in kernel.products]
        assert ends == [False, False, False, True] * ways, f"{what}: {kernel.products}"
        assert sum("tnspB" in product for product in kernel.products) == 4 * (ways - 1), what
        assert kernel.depths == [1, 0], what


def test_steps_copy_tiles_and_nothing_else(steps: dict[str, Kernel]) -> None:
    """In by TMA, out through shared memory by TMA; the one who asks for copies gives up registers for those who multiply."""
    for what, kernel in steps.items():
        assert kernel.count("UTMALDG") >= 3, what
        assert kernel.count("UTMASTG") > 0, what
        assert kernel.count("STSM") > 0, what
        assert kernel.count("STG") == kernel.count("STS") == kernel.count("LDGSTS") == 0, what
        assert kernel.count("UTMALDG", "MULTICAST") > 0, f"{what}: no copy to two blocks"
        assert kernel.count("UCGABAR_ARV") == kernel.count("UCGABAR_WAIT") == 2, f"{what}: blocks meet first and last"
        # Before the first copy and where the blocks of a cluster meet, not where a stage is given back.
        assert kernel.count("MEMBAR", "GPU") <= 3, f"{what}: fences of the whole chip"
        assert kernel.count("ACQBULK") == kernel.count("PREEXIT") == 1, f"{what}: the launch before, and the one after"
        assert kernel.count("USETMAXREG") == 2, what
        assert kernel.registers <= REGISTERS // 384, f"{what} begins with {kernel.registers} registers"
