"""How setup.py decides and builds, with a stand-in for nvcc: nothing is compiled here."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.csrc.conftest import ROOT, run_setup

# Answers --version, and "compiles" by writing the output and an empty depfile; each call is one line of $0.log.
FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.1"; exit 0; fi
echo "$@ $NVCC_APPEND_FLAGS" >> "$0.log"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2"; shift;;
    -MF) deps="$2"; shift;;
    *.cu) case "$1" in *broken*) echo "broken.cu(1): error"; exit 2;; esac; source="$1";;
    *.cpp) source="$1";;
  esac
  shift
done
[ -z "$deps" ] || echo "$out: $(echo "$source" | sed 's/ /\\\\ /g; s/\\$/$$/g')" > "$deps"
echo built > "$out"
"""

Functions = dict[str, Any]
MakeNvcc = Callable[[str], Path]


@pytest.fixture
def make_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeNvcc:
    """make_nvcc("12.8") puts a stand-in of that release into CUDA_HOME and returns its path."""

    def make(release: str) -> Path:
        nvcc = tmp_path / f"cuda {release}" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(FAKE_NVCC.format(release=release))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
        return nvcc

    return make


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Functions:
    """setup.py's functions, without the call to setup()."""
    for name in ("MEMVP_CUDA", "MEMVP_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, in a folder whose name needs quoting everywhere."""
    folder = tmp_path / "a $HOME & more"
    for name in ("setup.py", "pyproject.toml", "csrc", "memvp_kernels/__init__.py", "memvp_kernels/version.py"):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return folder


def test_cuda_home_comes_before_path(
    functions: Functions, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path, in_home = make_nvcc("12.0"), make_nvcc("12.9")
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=":")
    assert Path(functions["find_nvcc"]()) == in_home


def test_zero_does_not_look_for_nvcc(
    functions: Functions, make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nvcc("12.8")
    monkeypatch.setenv("MEMVP_CUDA", "0")
    assert functions["extensions"]() == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "nvcc was not found"),
        ("gone", r"CUDA_HOME is \S+gone, and there is no \S+gone/bin/nvcc; correct or unset it"),
        (FAKE_NVCC.format(release="11.8"), "release 11.8, and 12.0 or newer is needed"),
        ("#!/bin/sh\necho 'cicc: cannot execute' >&2\nexit 1\n", "nvcc does not run: cicc: cannot execute"),
        ("#!/nowhere/sh\n", "nvcc does not run: No such file or directory"),
        ("#!/bin/sh\necho hello\n", "nvcc --version does not say which release it is"),
    ],
    ids=["none", "a wrong CUDA_HOME", "too old", "fails", "no program", "speaks otherwise"],
)
def test_without_a_usable_nvcc(
    functions: Functions,
    make_nvcc: MakeNvcc,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    script: str | None,
    reason: str,
) -> None:
    """An install goes on without the extension and says why; one that requires it ends."""
    if script is None:
        monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    elif script == "gone":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    else:
        make_nvcc("12.8").write_text(script)
    assert functions["extensions"]() == []
    assert re.search(f"{reason}.*; installing without the CUDA extension", capsys.readouterr().err)
    monkeypatch.setenv("MEMVP_CUDA", "require")
    with pytest.raises(SystemExit, match=f"^MEMVP_CUDA=require: .*{reason}"):
        functions["extensions"]()


@pytest.mark.parametrize("mode", ["0", "auto"])
def test_a_library_of_an_earlier_build_is_named(
    mode: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (checkout / "memvp_kernels/_C.cpython-311-x86_64-linux-gnu.so").write_text("stale")
    done = run_setup("--version", folder=checkout, MEMVP_CUDA=mode, CUDA_HOME=str(tmp_path / "gone"))
    assert done.returncode == 0, done.stderr
    assert "_C.cpython-311-x86_64-linux-gnu.so is of an earlier build" in done.stderr
    assert "delete it" in done.stderr


def test_max_jobs(checkout: Path, make_nvcc: MakeNvcc) -> None:
    log = Path(f"{make_nvcc('12.8')}.log")
    done = run_setup("build_ext", "--build-lib", "lib", folder=checkout, MAX_JOBS="1", MEMVP_CUDA_ARCHS="80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all("--threads=1" in line for line in log.read_text().splitlines())


@pytest.mark.parametrize(
    ("asked", "version", "archs"),
    [
        ("", (12, 0), ["80", "90a", "90+PTX"]),
        ("", (12, 8), ["80", "90a", "100a", "120", "90+PTX"]),
        ("", (13, 0), ["80", "90a", "100a", "120", "90+PTX"]),
        ("90a", (12, 0), ["90a"]),
        ("80, 86;120f;", (13, 0), ["80", "86", "120f"]),
    ],
)
def test_target_archs(
    functions: Functions, monkeypatch: pytest.MonkeyPatch, asked: str, version: tuple[int, int], archs: list[str]
) -> None:
    monkeypatch.setenv("MEMVP_CUDA_ARCHS", asked)
    assert functions["target_archs"](version) == archs


@pytest.mark.parametrize(
    ("variable", "asked", "function", "says"),
    [
        ("MEMVP_CUDA", "1", "extensions", "wanted auto, 0 or require, got '1'"),
        ("MAX_JOBS", "many", "max_jobs", "wanted a positive number of processes, got 'many'"),
        *(
            ("MEMVP_CUDA_ARCHS", asked, "target_archs", r"wanted targets such as 80;90a;90\+PTX, got")
            for asked in ("9.0", "sm_90", "native", "90+SASS", "90a 80")
        ),
        *(
            (
                "MEMVP_CUDA_ARCHS",
                f"80;{asked}",
                "target_archs",
                f"wanted targets of 80 or newer, got '{re.escape(asked)}'",
            )
            for asked in ("75", "70+PTX")
        ),
    ],
)
def test_a_variable_that_is_not_understood(
    functions: Functions, monkeypatch: pytest.MonkeyPatch, variable: str, asked: str, function: str, says: str
) -> None:
    monkeypatch.setenv(variable, asked)
    with pytest.raises(SystemExit, match=f"^{variable}: {says}"):
        functions[function](*([(13, 0)] if function == "target_archs" else []))


def test_an_old_setuptools(functions: Functions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", "68.2.2")
    with pytest.raises(SystemExit, match=r"setuptools 77 or newer is needed, and this is 68\.2\.2: .*isolation"):
        functions["check_setuptools"]()


def test_ninja_compiles_what_changed(checkout: Path, make_nvcc: MakeNvcc) -> None:
    log = Path(f"{make_nvcc('12.8')}.log")

    def build() -> list[str]:
        log.write_text("")
        done = run_setup("build_ext", "--build-lib", "lib", folder=checkout, MEMVP_CUDA_ARCHS="80;90+PTX")
        assert done.returncode == 0, done.stdout + done.stderr
        return log.read_text().splitlines()

    hopper = {"csrc/hopper/ffn_gemm.cu"}  # without 90a among the targets its kernels are left out
    sources = [*(checkout / "csrc").glob("*.cpp"), *(checkout / "csrc/decode").glob("*.cu"), *hopper]
    first = build()
    assert len(first) == len(sources) + 1  # and the link
    assert all(str(checkout) in line for line in first)
    kernels = [line for line in first if "csrc/decode" in line and " -c " in line]
    assert kernels and all("code=sm_80" in line and "code=compute_90" in line for line in kernels)
    (library,) = (checkout / "lib/memvp_kernels").iterdir()
    assert library.read_text() == "built\n"

    assert build() == []
    (checkout / "csrc/bindings.cpp").write_text("// changed\n")
    assert len(build()) == 2


@pytest.mark.parametrize("archs", ["80;90a", "80;90+PTX"])
def test_hopper_kernels_are_compiled_for_hopper_alone(archs: str, functions: Functions) -> None:
    """Nothing of them where 90a is no target; then the launcher says so."""
    sources = [ROOT / source for source in functions["SOURCES"]]
    folder = ROOT / "build"
    rules = functions["ninja_rules"]("nvcc", (13, 0), archs.split(";"), sources, folder, folder / "_C.so")
    flags = dict(re.findall(r"compile \S+/csrc/(\S+)\n flags = (.*)", rules))
    wanted = {"ffn_gemm.cu", "kernels_bfloat16.cu", "kernels_float16.cu"} if "90a" in archs else {"ffn_gemm.cu"}
    of_hopper = {name: text for name, text in flags.items() if name.startswith("hopper/")}
    assert set(of_hopper) == {f"hopper/{name}" for name in wanted}
    for text in of_hopper.values():
        assert "sm_80" not in text
        assert ("sm_90a" in text and "MEMVP_HAS_SM90A" in text) == ("90a" in archs)
    objects = re.search(r"build \S+_C.so: link (.*)", rules)
    assert objects is not None
    assert len(set(objects[1].split())) == len(flags)


def test_a_failed_compilation_says_the_way_out(checkout: Path, make_nvcc: MakeNvcc) -> None:
    make_nvcc("12.8")
    (checkout / "csrc/decode/broken.cu").write_text("")
    done = run_setup("build_ext", "--build-lib", "lib", folder=checkout)
    assert done.returncode != 0
    assert "broken.cu(1): error" in done.stdout + done.stderr
    assert "MEMVP_CUDA=0 installs without" in done.stderr
    assert not (checkout / "lib").exists()
