"""The package's face: what it exports, what it imports, what it says of the machine."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import memvp_kernels
from memvp_kernels import fused_ffn

ROOT = Path(__file__).parents[2]


def test_public_names() -> None:
    assert sorted(memvp_kernels.__all__) == ["MemVPConfig", "MemVPModel", "__version__", "fused_ffn"]


def test_signature_is_the_contract() -> None:
    parameters = inspect.signature(fused_ffn).parameters
    positional = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["x", "key", "value", "visual_key", "visual_value"]
    defaults = {
        n: p.default
        for n, p in parameters.items()
        if p.default is not inspect.Parameter.empty and p.default is not None
    }
    assert defaults == {
        "activation": "silu", "visual_drop": 0.0, "visual_scale": 1.0, "dropout_p": 0.0, "recompute": False, "backend": "auto",
    }  # fmt: skip


def test_a_pinned_version_exists_for_every_python_that_is_promised() -> None:
    """For each package exactly one pin applies on 3.10 and on newer ones, and never a version that asks for a newer Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in ("3.10", "3.11", "3.14"):
        here = {"python_version": python, "python_full_version": f"{python}.0"}
        applying = [p for p in pins if p.marker is None or p.marker.evaluate(here)]
        # pyproject.toml asks for TRL, which brings datasets, on Python 3.11 and newer only.
        absent = {"trl", "datasets"} if python == "3.10" else set()
        assert sorted(p.name for p in applying) == sorted({p.name for p in pins} - absent)
        for pin in applying:
            try:
                about = metadata.metadata(pin.name)
            except metadata.PackageNotFoundError:
                continue
            if about["Version"] in pin.specifier and about["Requires-Python"]:
                assert f"{python}.99" in SpecifierSet(about["Requires-Python"]), f"{pin} has no Python {python}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_import_needs_neither_triton_nor_transformers() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('triton', 'transformers', 'safetensors', 'matplotlib'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
import torch, memvp_kernels
x, w = torch.randn(2, 3, 8), torch.randn(16, 8)
print(tuple(memvp_kernels.fused_ffn(x, w, w, x, x).shape))
"""
    assert run(code).strip() == "(2, 3, 8)"


def test_import_is_light() -> None:
    loaded = run(
        "import torch, sys; before = set(sys.modules); import memvp_kernels; print(*(set(sys.modules) - before))"
    ).split()
    assert not [m for m in loaded if m.split(".")[0] in ("triton", "transformers", "numpy")]


def test_diagnosis() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "memvp_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in (f"memvp_kernels {memvp_kernels.__version__}", "torch", "triton", "GPU", "extension", "backend"):
        assert word in said, said
