"""What a user installs: the source distribution, the install without nvcc, the wheel with the extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.csrc.emulate_decode import ROOT, build_folder

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
WHEEL_LIMIT = 5 * 2**20
NO_ISOLATION = ["--no-deps", "--no-build-isolation"]


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    merged = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=merged, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_under(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".egg-info" not in str(path)
    }


def tracked_files() -> list[str]:
    """The files that git knows or would add, as they are now."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clean checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    for name in tracked_files():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


@pytest.fixture(scope="module")
def site(unpacked: Path) -> Path:
    """Where the source distribution was installed without the extension."""
    target = unpacked.parents[1] / "site"
    run(*PIP, "install", *NO_ISOLATION, "--target", target, unpacked, folder=target.parent, MEMVP_CUDA="0")
    return target


def test_sdist_is_complete(unpacked: Path) -> None:
    folders = ("csrc", "memvp_kernels", "tests", "benchmarks", "examples")
    wanted = {name for name in files_under(unpacked.parents[1] / "checkout") if name.split("/")[0] in folders}
    assert {"csrc/bindings.cpp", "csrc/decode/ffn_decode.h", "memvp_kernels/py.typed"} <= wanted
    wanted |= {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert sorted(wanted - files_under(unpacked)) == []


def test_install_without_nvcc_is_whole(site: Path) -> None:
    packaged = {name for name in files_under(site.parent / "checkout") if name.startswith("memvp_kernels/")}
    assert "memvp_kernels/py.typed" in packaged
    assert sorted(packaged - files_under(site)) == []
    assert list((site / "memvp_kernels").glob("_C*")) == []
    (record,) = site.glob("memvp_kernels-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in record.read_text()


def test_install_without_nvcc_works_and_says_what_is_missing(site: Path) -> None:
    code = (
        # An editable install of this checkout would lend the wheel its own extension.
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(getattr(f, '__module__', ''))]\n"
        "import runpy, torch, memvp_kernels\n"
        "x, w = torch.ones(1, 2, 8), torch.ones(4, 8)\n"
        "print(memvp_kernels.__file__)\n"
        "print(tuple(memvp_kernels.fused_ffn(x, w, w).shape))\n"
        "try: memvp_kernels.fused_ffn(x, w, w, backend='cuda')\n"
        "except RuntimeError as error: print(error)\n"
        "runpy.run_module('memvp_kernels', run_name='__main__')\n"
    )
    lines = run(sys.executable, "-c", code, folder=site.parent, PYTHONPATH=str(site)).splitlines()
    assert lines[0] == str(site / "memvp_kernels/__init__.py")
    assert lines[1] == "(1, 2, 8)"
    missing = "the CUDA extension was not built"
    assert missing in lines[2]
    assert any(missing in line for line in lines[3:]), "python -m memvp_kernels does not say it"


def test_wheel_with_the_extension(library: Path, tmp_path: Path) -> None:
    with build_folder():  # ninja finds the library's objects done
        run(
            *PIP,
            "wheel",
            *NO_ISOLATION,
            "--wheel-dir",
            tmp_path,
            ROOT,
            folder=tmp_path,
            MEMVP_CUDA="require",
        )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < WHEEL_LIMIT
    assert wheel.name.split("-")[2] == f"cp{sys.version_info.major}{sys.version_info.minor}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert f"memvp_kernels/{library.name}" in names
        assert archive.read(f"memvp_kernels/{library.name}") == library.read_bytes()
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
