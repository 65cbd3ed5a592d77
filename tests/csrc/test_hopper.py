"""The primitives of a product on Hopper: their model in the host run, and what nvcc makes of their device bodies. Needs no GPU."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools

from tests.csrc import machine_code
from tests.csrc.host_run import ROOT, SOURCES, compile_host, compiler
from tests.csrc.machine_code import Kernel
from tests.csrc.planted_bugs import ENVIRONMENT, SANITIZERS

HERE = ROOT / "tests" / "csrc"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a build of hopper_selftest.cpp. The thread sanitizer wants addresses that don't move."""
    command = ["setarch", "-R", str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_model_is_right_and_notices_mistakes(tmp_path: Path) -> None:
    """In every order, with the address sanitizer watching."""
    program = tmp_path / "selftest"
    compile_host(HERE / "hopper_selftest.cpp", program, "-O1", "-g1", "-fsanitize=address")
    done = run(program)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_barriers_are_order_to_the_thread_sanitizer(tmp_path: Path) -> None:
    """It has nothing to say of what barriers separate, and names what none does."""
    program = tmp_path / "selftest"
    compile_host(HERE / "hopper_selftest.cpp", program, *SANITIZERS["thread"])
    done = run(program, "right")
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    raced = run(program, "race")
    assert raced.returncode != 0, "not noticed"
    assert "ThreadSanitizer: data race" in raced.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """hopper_code.cu for sm_90a."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        functions = runpy.run_path(str(ROOT / "setup.py"))
    try:
        nvcc = functions["find_nvcc"]()
        functions["nvcc_version"](nvcc)
    except functions["NoCompilerError"] as reason:
        pytest.skip(f"needs nvcc: {reason}")
    cubin = tmp_path_factory.mktemp("hopper") / "hopper.cubin"
    flags = ["-O3", "-std=c++17", "-Xptxas=-warn-spills", "-gencode=arch=compute_90a,code=sm_90a", f"-I{SOURCES}"]
    command = [nvcc, *flags, "-cubin", str(HERE / "hopper_code.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr, done.stderr  # ptxas says so where products wait for one another
    return machine_code.kernels(cubin)


# Of the mangled names: product_kernel<T, N, b's major, warpgroups that multiply, stages>.
FORMS = [("8BFloat16", 64, 0, 2), ("7Float16", 128, 1, 1), ("8BFloat16", 256, 1, 2), ("7Float16", 256, 0, 1)]


@pytest.mark.parametrize(("number", "columns", "major", "warpgroups"), FORMS)
def test_each_primitive_is_its_instruction(
    kernels: list[Kernel], number: str, columns: int, major: int, warpgroups: int
) -> None:
    (kernel,) = (k for k in kernels if f"{number}ELi{columns}ELNS_5MajorE{major}ELi{warpgroups}E" in k.name)
    assert (kernel.stack, kernel.local) == (0, 0), "spills"
    # The four products of a stage, and none that waits by itself: one fence, one wait in the loop, one at its end.
    modifiers = ["F32", f"64x{columns}x16", *(["BF16"] if number == "8BFloat16" else [])]
    assert kernel.count("HGMMA", *modifiers) == kernel.count("HGMMA") == 4
    assert kernel.count("WARPGROUP", "ARRIVE") == 1
    assert kernel.count("WARPGROUP", "DEPBAR") == 2
    # a's tiles have three dimensions; b's, along n, are of 64 columns each.
    assert kernel.count("UTMALDG", "3D") == warpgroups
    assert kernel.count("UTMALDG", "2D") == (columns // 64 if major else 1)
    assert kernel.count("UTMASTG", "3D") == columns // 64
    assert kernel.count("UTMACMDFLUSH") == 1  # commit_stores
    assert kernel.count("SYNCS", "EXCH") == 4  # init_barrier
    assert kernel.count("SYNCS", "ARRIVE", "TRANS64") >= 2
    assert kernel.count("SYNCS", "PHASECHK", "TRYWAIT") >= 2
    assert kernel.count("STSM", "M88", "4") == columns // 16
    assert kernel.count("USETMAXREG", "DEALLOC") == 1
    assert kernel.count("USETMAXREG", "TRY_ALLOC") == 1
    assert kernel.count("FENCE", "VIEW", "ASYNC") >= 2  # publish_barriers, fence_async_shared


def test_the_other_primitives_are_their_instructions(kernels: list[Kernel]) -> None:
    """Those that the product leaves out."""
    (kernel,) = (k for k in kernels if "other_kernel" in k.name)
    assert kernel.count("UTMACCTL", "PF") == 1  # prefetch_map
    assert kernel.count("UTMASTG", "2D") == 1
    assert kernel.count("STSM", "MT88", "4") == 1
    assert kernel.count("BAR", "ARV") == 1
