"""Kernels compiled ahead of time: packed, carried to another folder, and found there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def warmup(*arguments: str | Path, cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "memvp_kernels", "warmup", *map(str, arguments)]
    done = subprocess.run(
        command, env={**environment, "TRITON_CACHE_DIR": str(cache)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_an_archive_is_found_where_it_is_unpacked(tmp_path: Path) -> None:
    compiling = ("--shapes", "64x128", "--tokens", "2x16", "--slots", "16", "--rank", "8", "--inference")
    compiling += ("--architecture", "90")
    said = warmup(*compiling, "--archive", tmp_path / "kernels.tar.xz", cache=tmp_path / "unused")
    assert said.startswith("sm_90: ")
    warmup("--unpack", tmp_path / "kernels.tar.xz", cache=tmp_path / "cache")
    known = files(tmp_path / "cache")
    assert warmup(*compiling, cache=tmp_path / "cache").startswith("sm_90: ")
    assert files(tmp_path / "cache") == known
    assert any(path.suffix == ".cubin" for path in known)
    assert not (tmp_path / "unused").exists()
