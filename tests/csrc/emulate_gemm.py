"""Runs the Hopper kernels' own source on the CPU (tests/csrc/emulation) over tensors as the launcher takes them."""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path

import torch
from torch import Tensor

from tests.csrc.emulate_decode import (
    ACTIVATIONS,
    EMULATION,
    TYPES,
    Config,
    EmulationError,
    compile_emulation,
    emulated_library,
)

_NUMBERS = itertools.count()
KINDS = {"hidden": 0, "output": 1, "dhidden": 2}


class Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


class Vector(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("wide", ctypes.c_bool))


class Product(ctypes.Structure):
    _fields_ = (("left", Matrix), ("right", Matrix), ("depth", ctypes.c_int32), ("across", ctypes.c_bool))


class GemmParams(ctypes.Structure):
    """memvp::FfnGemmParams."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "kind", "activation", "rows", "columns")),
        ("products", Product * 3),
        ("product_count", ctypes.c_int32),
        ("gate", Matrix),
        ("bias", Vector),
        ("gate_bias", Vector),
        ("residual", Matrix),
        ("result", Matrix),
        ("pre", ctypes.c_void_p),
        ("dpre", ctypes.c_void_p),
        ("gated", ctypes.c_bool),
        ("shared", Matrix),
        ("shared_result", Matrix),
        *((name, ctypes.c_int32) for name in ("shared_columns", "multiprocessors", "cluster", "warpgroups", "device")),
    )


class Gemm:
    """The arguments of one launch, and the tensors that they point to.

    Args:
        kind: of KINDS.
        columns: F or d; 0: the shared columns alone.
        products: (left (N, K), right), right (K, columns) with contiguous rows or contiguous columns.
        gate: (F, d), rows contiguous, as the shared columns' right operand `shared` (M, d).
        pre, dpre: (P, N, F) contiguous.
    """

    def __init__(
        self, kind: str, columns: int, products: list[tuple[Tensor, Tensor | None]], *, activation: str = "silu", gate: Tensor | None = None,
        bias: Tensor | None = None, gate_bias: Tensor | None = None, residual: Tensor | None = None, result: Tensor | None = None,
        pre: Tensor | None = None, dpre: Tensor | None = None, shared: Tensor | None = None, shared_result: Tensor | None = None,
        multiprocessors: int = 2, cluster: int = 0, warpgroups: int = 0,
    ) -> None:  # fmt: skip
        first = products[0][0]
        p = self.params = GemmParams()
        p.type, p.kind, p.activation = TYPES[first.dtype], KINDS[kind], ACTIVATIONS[activation]
        p.rows, p.columns = first.shape[0], columns
        p.multiprocessors, p.cluster, p.warpgroups = multiprocessors, cluster, warpgroups
        self.read: list[Tensor] = []
        for i, (left, right) in enumerate(products):
            p.products[i].left, p.products[i].depth = self._matrix(left), left.shape[1]
            if right is not None:
                p.products[i].across = right.stride(1) == 1
                p.products[i].right = self._matrix(right if p.products[i].across else right.T)
        p.product_count = len(products)
        p.gate, p.shared = self._matrix(gate), self._matrix(shared)
        p.residual = self._matrix(residual, read=residual is not result)
        p.bias, p.gate_bias = self._vector(bias), self._vector(gate_bias)
        self.written = [t for t in (result, pre if kind == "hidden" else dpre, shared_result) if t is not None]
        p.result = self._matrix(result, read=False)
        p.shared_result = self._matrix(shared_result, read=False)
        p.pre, p.dpre = _address(pre), _address(dpre)
        if kind == "dhidden" and pre is not None and pre is not dpre:
            self.read.append(pre)
        kept = pre if pre is not None else dpre
        p.gated = gate is not None or (kind == "dhidden" and kept is not None and kept.shape[0] == 2)
        p.shared_columns = 0 if shared is None else shared.shape[0]

    def _matrix(self, matrix: Tensor | None, *, read: bool = True) -> Matrix:
        if matrix is None:
            return Matrix()
        assert matrix.stride(1) == 1
        if read:
            self.read.append(matrix)
        return Matrix(matrix.data_ptr(), matrix.stride(0))

    def _vector(self, vector: Tensor | None) -> Vector:
        if vector is None:
            return Vector()
        self.read.append(vector)
        return Vector(vector.data_ptr(), vector.dtype == torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class GemmLibrary:
    """emulation/gemm_library.cpp; over the mutated kernels in `sources`, if any."""

    def __init__(self, sources: Path | None = None) -> None:
        if sources is None:
            self._library = ctypes.CDLL(str(emulated_library()))
        else:  # a mutation may leave something unused; the loader knows a library by its name
            path = sources / f"gemm-{os.getpid()}-{next(_NUMBERS)}.so"
            how = ("-Og", "-shared", "-fPIC", "-Wno-psabi", "-Wno-error")
            compile_emulation(EMULATION / "gemm_library.cpp", path, *how, sources=sources)
            self._library = ctypes.CDLL(str(path))
            path.unlink()
        self._library.emulation_gemm_params_bytes.restype = ctypes.c_uint64
        self._library.emulation_gemm_unsupported.restype = ctypes.c_char_p
        assert self._library.emulation_gemm_params_bytes() == ctypes.sizeof(GemmParams), "not FfnGemmParams"

    def run(self, gemm: Gemm, *, order: str = "random", seed: int = 1, resident: int = 2) -> None:
        """Executes the launch; raises EmulationError with what the emulation noticed."""
        config = Config(order, resident, seed, gemm.read)
        message = ctypes.create_string_buffer(4096)
        if self._library.emulation_gemm(ctypes.byref(gemm.params), ctypes.byref(config), message, 4096):
            raise EmulationError(message.value.decode())

    def unsupported(self, gemm: Gemm) -> str | None:
        text = self._library.emulation_gemm_unsupported(ctypes.byref(gemm.params))
        return None if text is None else str(text.decode())

    def shape(self, params: GemmParams) -> tuple[int, int]:
        """(blocks of a cluster, warpgroups that multiply) of a product of these sizes; looks at no data."""
        out = (ctypes.c_int32 * 2)()
        self._library.emulation_gemm_shape(ctypes.byref(params), out)
        return out[0], out[1]
