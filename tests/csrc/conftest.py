"""The compiled extension for the tests: built once per session by setup.py itself, and again only where a source has changed."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.csrc import fake_gpu
from tests.csrc.emulate_decode import ROOT, build_folder, emulated_library


def run_setup(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py as pip runs it, with these environment variables added."""
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    merged = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True)


@pytest.fixture(scope="session")
def library() -> Path:
    """The extension's shared library, for the default targets or MEMVP_CUDA_ARCHS; with MEMVP_TEST_INSTALLED=1 the package's own."""
    if os.environ.get("MEMVP_TEST_INSTALLED") == "1":
        return ROOT / "memvp_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    with build_folder() as folder:
        done = run_setup("build_ext", "--build-lib", str(folder / "tests"), MEMVP_CUDA="require")
        if "MEMVP_CUDA=require:" in done.stderr:
            pytest.skip(f"needs nvcc: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = (folder / "tests" / "memvp_kernels").glob("_C.*.so")
    return found


def load_extension(library: Path, package: str) -> ModuleType:
    """The module of a library, outside sys.modules. pybind11 keeps one module per name, so each library needs its own `package`."""
    spec = importlib.util.spec_from_file_location(f"{package}._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def built_extension(library: Path) -> ModuleType:
    return load_extension(library, "built")


@functools.cache
def build_emulated_extension() -> ModuleType:
    """csrc/bindings.cpp over the CPU emulation: a module whose pointers are the host's."""
    return load_extension(emulated_library(), "emulated")


@pytest.fixture(scope="session")
def emulated_extension() -> ModuleType:
    return build_emulated_extension()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Before and after the test nothing is remembered of the machine."""
    fake_gpu.forget()
    yield
    fake_gpu.forget()


@pytest.fixture
def extension(forgetful: None, built_extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The freshly built extension in the place of an installed one."""
    monkeypatch.setitem(sys.modules, "memvp_kernels._C", built_extension)
    return built_extension
