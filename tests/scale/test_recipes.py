"""The recipes of docs/scaling.md, run as written on a tiny LLaMA."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.scale.processes import Group, free_port
from tests.scale.tiny import saved_base, shape

ROOT = Path(__file__).parents[2]
PROGRAMS = dict(
    re.findall(r"```python\n# (\w+\.py).*?\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
)


def test_the_document_has_the_four() -> None:
    assert sorted(PROGRAMS) == ["data.py", "train_4bit.py", "train_ddp.py", "train_fsdp2.py", "train_tp.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The programs and a language model, in a folder of their own."""
    for name, program in PROGRAMS.items():
        (tmp_path / name).write_text(program)
    saved_base(tmp_path / "llama")
    return tmp_path


@pytest.fixture(scope="module")
def bare() -> Iterator[Group]:
    """Two ranks that have not met: the programs see to that."""
    group = Group(2, meet=False)
    yield group
    group.stop()


def _run(program: str, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = [program, "llama"]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("data", None)


def _check(folder: Path) -> None:
    config = json.loads((folder / "adapter" / "memvp_config.json").read_text())
    assert config["num_slots"] == 320
    state = load_file(folder / "adapter" / "memvp_model.safetensors")
    assert state["value_position"].norm() > 0, "nothing was trained"
    assert all(torch.isfinite(t).all() for t in state.values())


@pytest.mark.parametrize("program", ["train_ddp.py", "train_fsdp2.py", "train_tp.py"])
def test_two_processes(bare: Group, folder: Path, program: str) -> None:
    bare.run(_run, program, str(folder), free_port())
    _check(folder)
    assert (folder / "checkpoint").exists() == (program == "train_fsdp2.py")


def test_torchrun(folder: Path) -> None:
    """The real launcher, once."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train_ddp.py",
        "llama",
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _check(folder)


def test_a_4_bit_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the `quantized` extra: pip install memvp_kernels[quantized]")
    pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["train_4bit.py", "llama"])
    made: dict[str, Any] = runpy.run_path("train_4bit.py", run_name="__main__")
    sys.modules.pop("data", None)
    _check(folder)
    kinds = {type(ffn.up_proj).__name__ for _, ffn in made["model"].memory_ffns()}
    assert kinds == {"Linear4bit"}
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    assert shape().hidden_size == made["model"].key_position.shape[-1]
