"""Build memvp_kernels._C, the CUDA C++ extension, where nvcc is found; everywhere else install without it.

The extension includes no torch header and links the CUDA runtime statically, so one build serves every torch and
imports on a machine without a driver. Metadata stands in pyproject.toml. Read here and nowhere else:

    MEMVP_CUDA           auto (default): build where nvcc is found; 0: do not build; require: fail where nvcc is missing.
    MEMVP_CUDA_ARCHS     targets, separated by ; or ",", such as "80;90a;90+PTX". "90" is machine code for that chip;
                         "90+PTX" is PTX alone, which the driver compiles at load on that chip and all newer ones.
    CUDA_HOME, CUDA_PATH the toolkit whose bin/nvcc is taken; without them nvcc on PATH, then /usr/local/cuda.
    MAX_JOBS             processes that compile at a time; default: as many as there are cores.

nvcc itself reads NVCC_APPEND_FLAGS: -lineinfo there lets a profiler show source lines, in a library three times as large.
"""

from __future__ import annotations

import filecmp
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.cu"))]
HOPPER = "90a"  # the one target of the kernels in csrc/hopper, whose instructions no other chip has
OLDEST_NVCC = (12, 0)  # the first that knows sm_90a
#: Default target: the nvcc that it needs. "120" also runs on 12.1.
ARCHS_FROM = {"80": (12, 0), "90a": (12, 0), "100a": (12, 8), "120": (12, 8), "90+PTX": (12, 0)}
OLDEST_ARCH = 80
OLDEST_SETUPTOOLS = 77  # as pyproject.toml says, which a build without pip's isolation does not read

Version = tuple[int, int]


class NoCompilerError(Exception):
    """Why this machine cannot compile the extension."""


def find_nvcc() -> str:
    """The path of nvcc: of CUDA_HOME or CUDA_PATH where they are set, else on PATH, else where the toolkit installs itself."""
    if not sys.platform.startswith("linux"):
        raise NoCompilerError(f"the CUDA extension builds on Linux, and this is {sys.platform}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
                return found
            raise NoCompilerError(f"{name} is {home}, and there is no {home}/bin/nvcc; correct or unset it")
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    raise NoCompilerError("nvcc was not found on PATH or in /usr/local/cuda, and CUDA_HOME is not set")


def nvcc_version(nvcc: str) -> Version:
    """The release of an nvcc, such as (12, 8)."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise NoCompilerError(f"{nvcc} does not run: {error.strerror}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise NoCompilerError(f"{nvcc} does not run: {said[-1]}")
    match = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if match is None:
        raise NoCompilerError(f"{nvcc} --version does not say which release it is")
    version = int(match[1]), int(match[2])
    if version < OLDEST_NVCC:
        wanted = ".".join(map(str, OLDEST_NVCC))
        raise NoCompilerError(f"{nvcc} is release {match[1]}.{match[2]}, and {wanted} or newer is needed")
    return version


def target_archs(version: Version) -> list[str]:
    """The architectures to compile for: those of MEMVP_CUDA_ARCHS, else every default that this nvcc knows."""
    asked = os.environ.get("MEMVP_CUDA_ARCHS", "").replace(",", ";").split(";")
    archs = [arch.strip() for arch in asked if arch.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            raise SystemExit(f"MEMVP_CUDA_ARCHS: wanted targets such as 80;90a;90+PTX, got {arch!r}")
        if int(re.match(r"\d+", arch)[0]) < OLDEST_ARCH:
            raise SystemExit(f"MEMVP_CUDA_ARCHS: wanted targets of {OLDEST_ARCH} or newer, got {arch!r}")
    return archs or [arch for arch, needed in ARCHS_FROM.items() if version >= needed]


def gencode(arch: str) -> str:
    """The nvcc flag for one target."""
    number = arch.removesuffix("+PTX")
    return f"-gencode=arch=compute_{number},code={'sm' if number == arch else 'compute'}_{number}"


def max_jobs() -> int | None:
    """MAX_JOBS, or None where it is not set."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked and not (asked.isdecimal() and int(asked) > 0):
        raise SystemExit(f"MAX_JOBS: wanted a positive number of processes, got {asked!r}")
    return int(asked) if asked else None


def run_ninja(folder: Path, jobs: int | None) -> bool:
    """Builds what build.ninja says; whether that succeeded. Without a limit nvcc compiles all targets of a file at once."""
    threads = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads={0 if jobs is None else 1}".strip()
    command = [ninja_program(), "-C", str(folder), *([] if jobs is None else ["-j", str(jobs)])]
    return subprocess.run(command, env={**os.environ, "NVCC_APPEND_FLAGS": threads}).returncode == 0


def ninja_program() -> str:
    """The ninja of the build environment (the PyPI package), else the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("ninja was not found: pip install ninja, or build with pip's isolation on") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def copy_headers(source: Path, target: Path) -> None:
    """Copy changed headers only: pip's isolated environment moves at every build, and ninja would rebuild all."""
    for header in source.rglob("*.h"):
        copy = target / header.relative_to(source)
        if not (copy.exists() and filecmp.cmp(header, copy, shallow=False)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, copy)


def shell(words: Iterable[str]) -> str:
    """Words as they stand in a ninja command."""
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)


def ninja_path(path: Path) -> str:
    """A path as it stands in a ninja build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_rules(nvcc: str, version: Version, archs: list[str], sources: list[Path], folder: Path, library: Path) -> str:
    """The text of build.ninja: an object per source, one library. Without Hopper among the targets its kernels are left out."""
    includes = [f"-I{folder / 'include'}", f"-I{sysconfig.get_path('include')}", f"-I{ROOT / 'csrc'}"]
    common = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-warn-spills"]
    # A sixth of the size; drivers older than CUDA 12.4 can't read it, and 13 needs a newer one.
    compress = ["--compress-mode=size"] if version >= (13, 0) else []
    targets = [*(gencode(arch) for arch in archs), *compress]
    build = [f'-DMEMVP_CUDA_VERSION="{".".join(map(str, version))}"', f'-DMEMVP_CUDA_ARCHS="{";".join(archs)}"']
    lines = [
        f"rule compile\n command = {shell([nvcc, *common, *includes])} $flags -MD -MF $out.d -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        f"rule link\n command = {shell([nvcc, '-shared', '-cudart=static', '-nodlink'])} $in -o $out "
        "-Xlinker=-s,--exclude-libs,ALL",
    ]
    objects = []
    for source in sources:
        flags = build if source.suffix == ".cpp" else targets
        if source.parent.name == "hopper":
            if HOPPER not in archs and source.name.startswith("kernels"):
                continue
            flags = [gencode(HOPPER), *compress, "-DMEMVP_HAS_SM90A"] if HOPPER in archs else []
        objects.append(ninja_path(folder / f"{source.parent.name}-{source.name}.o"))
        lines.append(f"build {objects[-1]}: compile {ninja_path(source)}")
        lines.append(f" flags = {shell(flags)}")
    lines.append(f"build {ninja_path(library)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles with nvcc under ninja, in a folder that is kept: a second build compiles what has changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError:
            raise SystemExit("pybind11 was not found: pip install pybind11, or build with pip's isolation on") from None
        nvcc = find_nvcc()
        version = nvcc_version(nvcc)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        copy_headers(Path(pybind11.get_include()), folder / "include")
        library = folder / target.name
        sources = [ROOT / source for source in ext.sources]
        rules = ninja_rules(nvcc, version, target_archs(version), sources, folder, library)
        (folder / "build.ninja").write_text(rules)
        if not run_ninja(folder, max_jobs()):
            raise SystemExit("memvp_kernels: nvcc failed, see above; MEMVP_CUDA=0 installs without the CUDA extension")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")  # renamed, as a running process may have the old one mapped
        shutil.copyfile(library, partial)
        partial.replace(target)


def warn_of_stale_libraries() -> None:
    """Names the libraries of earlier builds, which a checkout that is imported in place goes on using."""
    for library in sorted((ROOT / "memvp_kernels").glob("_C*.so")):
        text = "of an earlier build and stays in use where this checkout is imported in place; delete it to be without"
        print(f"memvp_kernels: {library} is {text}", file=sys.stderr)


def check_setuptools() -> None:
    """Refuses a setuptools that would misread pyproject.toml."""
    version = setuptools.__version__
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        needed = f"setuptools {OLDEST_SETUPTOOLS} or newer is needed, and this is {version}"
        raise SystemExit(f"{needed}: pip install -U setuptools, or build with pip's isolation on")


def extensions() -> list[Extension]:
    """The extension, or nothing on a machine that cannot build it (an error there under MEMVP_CUDA=require)."""
    mode = os.environ.get("MEMVP_CUDA", "auto")
    if mode not in ("auto", "0", "require"):
        raise SystemExit(f"MEMVP_CUDA: wanted auto, 0 or require, got {mode!r}")
    if mode == "0":
        warn_of_stale_libraries()
        return []
    try:
        nvcc_version(find_nvcc())
    except NoCompilerError as reason:
        if mode == "require":
            raise SystemExit(f"MEMVP_CUDA=require: {reason}") from None
        print(f"memvp_kernels: {reason}; installing without the CUDA extension", file=sys.stderr)
        warn_of_stale_libraries()
        return []
    return [Extension("memvp_kernels._C", SOURCES)]


check_setuptools()
setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
