"""Runs the decode kernels' own source on the CPU (tests/csrc/emulation) over the arguments of `reference.ffn`.

`DecodeLibrary.run` executes a `Case` in this process; `write_cases` stores many of them with their expected results for the programs
that run under a sanitizer, where torch can't.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memvp_kernels import reference
from tests import tolerance

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
EMULATION = ROOT / "tests" / "csrc" / "emulation"
BUILD = ROOT / "build"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

TENSORS = (
    "x", "key", "value", "gate", "key_bias", "gate_bias", "value_bias", "visual_key", "visual_value", "visual_basis",
    "key_position", "value_position", "residual",
)  # fmt: skip
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
FORMS = {"auto": 0, "pdl": 1, "cooperative": 2}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class DecodeTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3), ("type", ctypes.c_int32))


class Params(ctypes.Structure):
    """memvp::FfnDecodeParams."""

    _fields_ = (
        ("type", ctypes.c_int32),
        *((name, DecodeTensor) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "visual_index", "visual_lengths", "y")),
        ("y_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
        *(
            (n, ctypes.c_int32)
            for n in ("tokens", "width", "pairs", "slots", "rank", "memories", "sequences", "length")
        ),
        ("shared_memory", ctypes.c_bool),
        ("activation", ctypes.c_int32),
        ("visual_activation", ctypes.c_int32),
        ("visual_scale", ctypes.c_float),
        ("form", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("device", ctypes.c_int32),
    )


class Range(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class Config(ctypes.Structure):
    """memvp::emulation::Config: in which order things happen, and what may be read."""

    _fields_ = (
        ("order", ctypes.c_int32),
        ("resident", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("inputs", ctypes.POINTER(Range)),
        ("input_count", ctypes.c_uint64),
    )

    def __init__(self, order: str, resident: int, seed: int, tensors: Iterable[Tensor]) -> None:
        inputs = [Range(t.data_ptr(), extent(t)) for t in tensors if t.numel()]
        super().__init__(ORDERS[order], resident, seed, (Range * len(inputs))(*inputs), len(inputs))


class EmulationError(RuntimeError):
    """A mistake of the kernels that the emulation noticed."""


#: What `emulation_decode_plan` tells, in its order.
PLAN = (
    *(
        f"{pipeline}_{number}"
        for pipeline in ("hidden", "value", "scores", "values")
        for number in ("pairs_per_block", "row_blocks", "splits", "slices_per_split", "slices_per_stage")
    ),
    "first_blocks", "second_blocks", "third_blocks", "first_shared", "second_shared", "cooperative_blocks", "core_blocks",
    "cooperative_shared",
)  # fmt: skip


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def compile_emulation(source: Path, output: Path, *flags: str, sources: Path = SOURCES) -> None:
    """Compiles a C++ file against the kernels in `sources`, the emulation's headers before their own."""
    includes = [f"-I{EMULATION}", f"-I{sources}"]
    command = [compiler() or "g++", *FLAGS, *flags, *includes, str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[:4000]}"


@contextlib.contextmanager
def build_folder() -> Iterator[Path]:
    """build/, for one process at a time: pytest-xdist's workers share it, and what is compiled there."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield BUILD


@functools.cache
def emulated_library() -> Path:
    """emulation/extension.cpp and csrc/bindings.cpp: a library for ctypes and an extension module. Compiled where a source is newer."""
    pybind11 = pytest.importorskip("pybind11")
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    with build_folder() as folder:
        output = folder / "emulated_extension" / "_C.so"
        output.parent.mkdir(exist_ok=True)
        files = (path for top in (SOURCES, EMULATION) for path in top.rglob("*") if path.is_file())
        if not output.exists() or output.stat().st_mtime < max(path.stat().st_mtime for path in files):
            how = ["-O1", "-shared", "-fPIC", '-DMEMVP_CUDA_VERSION="none"', '-DMEMVP_CUDA_ARCHS="90"', "-Wno-psabi"]
            includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            compile_emulation(EMULATION / "extension.cpp", output, *how, *includes, str(SOURCES / "bindings.cpp"))
    return output


class Case:
    """Arguments of `reference.ffn` as the launcher takes them; owns every tensor that the struct points to."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        multiprocessors: int = 3,
        shared_bytes: int = 228 << 10,
        form: str = "auto",
        y: Tensor | None = None,
    ) -> None:
        self.arguments = arguments
        x: Tensor = arguments["x"]
        rows = x.reshape(-1, x.shape[-1])
        tokens, width = rows.shape
        self.y = torch.full((tokens, width), float("nan"), dtype=x.dtype) if y is None else y
        self.tensors: dict[str, Tensor] = {"x": rows}
        for name in TENSORS[1:]:
            if arguments.get(name) is not None:
                self.tensors[name] = arguments[name]
        if "residual" in self.tensors:
            self.tensors["residual"] = self.tensors["residual"].reshape(-1, width)
        memory = arguments.get("visual_key")
        shared = memory is not None and memory.dim() == 2
        for name in ("visual_key", "visual_value"):
            if shared:
                self.tensors[name] = arguments[name][None]
        index, cu = arguments.get("visual_index"), arguments.get("cu_seqlens")
        for name, tensor in (
            ("visual_index", index),
            ("cu_seqlens", cu),
            ("visual_lengths", arguments.get("visual_lengths")),
        ):
            if tensor is not None:
                self.tensors[name] = tensor.to(torch.int32)
        if shared and index is not None:
            shared = False
        sequences = len(cu) - 1 if cu is not None else x.shape[0] if x.dim() == 3 else 1
        p = self.params = Params()
        p.type = TYPES[x.dtype]
        for name in TENSORS:
            tensor = self.tensors.get(name)
            if tensor is not None:
                field = getattr(p, name)
                field.data, field.type = tensor.data_ptr(), TYPES[tensor.dtype]
                for i, stride in enumerate(tensor.stride()):
                    field.strides[i] = stride
        for name in ("cu_seqlens", "visual_index", "visual_lengths"):
            if name in self.tensors:
                setattr(p, name, self.tensors[name].data_ptr())
        p.y, p.y_stride = self.y.data_ptr(), self.y.stride(0)
        p.tokens, p.width, p.sequences = tokens, width, sequences
        p.length = x.shape[1] if x.dim() == 3 and cu is None else tokens
        p.pairs = 0 if arguments.get("key") is None else arguments["key"].shape[0]
        if memory is not None:
            p.memories, p.slots = self.tensors["visual_key"].shape[:2]
            basis = arguments.get("visual_basis")
            p.rank = 0 if basis is None else basis.shape[0]
        p.shared_memory = shared
        p.activation = ACTIVATIONS[arguments.get("activation", "silu")]
        p.visual_activation = ACTIVATIONS[arguments.get("visual_activation") or arguments.get("activation", "silu")]
        p.visual_scale = arguments.get("visual_scale", 1.0)
        p.multiprocessors, p.shared_bytes, p.form = multiprocessors, shared_bytes, FORMS[form]

    @functools.cached_property
    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """The float64 result, and PyTorch's own in the case's dtype: a few orders of the same sums."""
        known = {"key": None, "value": None} | {k: v for k, v in self.arguments.items() if v is not None}
        orders = [tolerance.plain, *(tolerance.reordered(seed) for seed in (1, 2, 3))]
        shape = self.y.shape
        return reference.ffn(**known).reshape(shape), [plain(**known).reshape(shape) for plain in orders]

    def check(self) -> None:
        tolerance.assert_within_twice(self.y, *self.expected)


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()


class DecodeLibrary:
    """emulation/decode_library.cpp."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(emulated_library()))
        self._library.emulation_decode_params_bytes.restype = ctypes.c_uint64
        self._library.emulation_decode_workspace_bytes.restype = ctypes.c_uint64
        self._library.emulation_decode_unsupported.restype = ctypes.c_char_p
        assert self._library.emulation_decode_params_bytes() == ctypes.sizeof(Params), "Params is not FfnDecodeParams"

    def run(self, case: Case, *, order: str = "random", seed: int = 1, resident: int = 4) -> int:
        """Executes the step into case.y; how many blocks began before the launch ahead had ended. Raises EmulationError."""
        config = Config(order, resident, seed, case.tensors.values())
        early, message = ctypes.c_uint64(), ctypes.create_string_buffer(4096)
        arguments = (ctypes.byref(value) for value in (case.params, config, early))
        if self._library.emulation_decode(*arguments, message, 4096):
            raise EmulationError(message.value.decode())
        return early.value

    def unsupported(self, case: Case) -> str | None:
        text = self._library.emulation_decode_unsupported(ctypes.byref(case.params))
        return None if text is None else str(text.decode())

    def is_fast(self, case: Case) -> bool:
        return bool(self._library.emulation_decode_is_fast(ctypes.byref(case.params)))

    def workspace_bytes(self, params: Params) -> int:
        return int(self._library.emulation_decode_workspace_bytes(ctypes.byref(params)))

    def plan(self, params: Params) -> dict[str, int]:
        """How a step of these sizes is divided into blocks; looks at no data."""
        out = (ctypes.c_int64 * len(PLAN))()
        self._library.emulation_decode_plan(ctypes.byref(params), out)
        return dict(zip(PLAN, out, strict=True))


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    """The file that emulation/cases.cpp reads: each buffer in full, the params with (buffer, offset) for pointers, the float64
    result, and the two errors that are allowed."""
    stored: Sequence[Case] = list(cases)
    with path.open("wb") as file:
        file.write(struct.pack("<QQ", ctypes.sizeof(Params), len(stored)))
        for case in stored:
            file.write(struct.pack("<Q", len(case.tensors)))
            params = Params.from_buffer_copy(case.params)
            for number, (name, tensor) in enumerate(case.tensors.items(), start=1):
                data = ctypes.string_at(tensor.data_ptr(), extent(tensor)) if tensor.numel() else b""
                offset = tensor.data_ptr() % 16
                file.write(struct.pack("<QQ", len(data), offset))
                file.write(data)
                if name in TENSORS:
                    getattr(params, name).data = number
                else:
                    setattr(params, name, number)
            exact, theirs = case.expected
            params.y, params.y_stride = 0, exact.shape[1]
            file.write(bytes(params))
            norm, largest = (max(e) for e in zip(*(tolerance.errors(t, exact) for t in theirs), strict=True))
            rounding = exact.abs() * torch.finfo(case.y.dtype).eps / 2
            file.write(
                struct.pack("<dd", max(2 * norm, rounding.norm().item()), max(2 * largest, rounding.max().item()))
            )
            file.write(exact.contiguous().numpy().tobytes())
