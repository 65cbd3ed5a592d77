"""The built library as a file and as a module: what it depends on, that it needs no driver, what it answers without one."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from memvp_kernels.backends.cuda import decode, status
from memvp_kernels.checks import ACTIVATIONS
from memvp_kernels.problem import Problem
from tests import cases
from tests.csrc.fake_gpu import Machine, on_gpu, problem_of

SYSTEM_LIBRARIES = r"lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux-\S+"


def test_depends_on_the_system_alone(library: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listed = subprocess.run(["readelf", "--dynamic", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listed)
    assert needed
    assert [name for name in needed if not re.fullmatch(SYSTEM_LIBRARIES, name)] == []


def test_imports_without_torch_and_driver(library: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('memvp_kernels._C', {str(library)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cuda, module.archs)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+ [\w;+]+\n", done.stdout)


def test_speaks_the_operators_language(built_extension: ModuleType) -> None:
    assert set(built_extension.activation_codes) == set(ACTIVATIONS)
    assert set(built_extension.type_codes) == {"bfloat16", "float16", "float32"}
    assert set(built_extension.gemm_codes) == {"hidden", "output", "dhidden"}
    fields = {field.name for field in dataclasses.fields(Problem)}
    assert set(built_extension.tensor_names) == fields - {
        "seed", "segments", "activation", "visual_activation", "visual_scale", "dropout_p", "visual_map", "visual_drop", "key_operand",
        "value_operand",
    }  # fmt: skip


def test_status_names_the_build(extension: ModuleType) -> None:
    available, reason, build = status()
    assert build == {"cuda": extension.cuda, "archs": extension.archs}
    assert available == torch.cuda.is_available()
    assert available or "CUDA" in reason or "GPU" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_says_so(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(extension).install(monkeypatch)
    problem = on_gpu(problem_of(**cases.build("one_token-factored", torch.bfloat16)))
    assert decode.unsupported(problem) is None
    with pytest.raises(RuntimeError, match=r"^ffn_decode: .*(driver|device)"):
        decode.forward(problem)


def product(x: torch.Tensor, y: torch.Tensor, **changes: Any) -> dict[str, Any]:
    """Arguments of `gemm` for x · x, into y."""
    matrix = (x.data_ptr(), x.stride(0))
    arguments = {
        "kind": 1,
        "type": 0,
        "activation": 0,
        "rows": len(x),
        "columns": x.shape[1],
        "products": ((matrix, matrix, len(x), True),),
    }
    where = {"multiprocessors": 132, "device": 0, "stream": 0}
    return {**arguments, **where, "result": (y.data_ptr(), y.stride(0)), **changes}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gemm_without_a_gpu_says_so(built_extension: ModuleType) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"^ffn_gemm: .*(driver|device)"):
        built_extension.gemm(**product(x, torch.empty_like(x)))


def test_a_gemm_says_what_it_can_not_take(emulated_extension: ModuleType) -> None:
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    y = torch.full_like(x, float("nan"))
    emulated_extension.gemm(**product(x, y))
    assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match=r"^ffn_gemm: .*multiple of 8"):
        emulated_extension.gemm(**product(x, y, columns=63))
    with pytest.raises(TypeError, match="three at most"):
        emulated_extension.gemm(**product(x, y, products=((None, None, 64, True),) * 4))
    with pytest.raises(TypeError, match="left, right, depth, across"):
        emulated_extension.gemm(**product(x, y, products=((None, None, 64),)))
