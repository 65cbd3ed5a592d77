"""The decode kernel's Python side: a problem becomes the parameters of csrc/decode/ffn_decode.h, and one launch."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memvp_kernels.backends.cuda.extension import device_limit, load
from memvp_kernels.checks import IDENTITY
from memvp_kernels.problem import Problem

__all__ = ["forward", "is_fast", "override_form", "unsupported"]

_TYPES = (torch.bfloat16, torch.float16)


class _Prepared(NamedTuple):
    """The parameters of one problem, with what must outlive their launch: indices that had to be copied."""

    problem: weakref.ref[Problem]
    params: Any
    indices: list[Tensor | None]


_latest: _Prepared | None = None
_form = "auto"


@contextlib.contextmanager
def override_form(form: str) -> Iterator[None]:
    """Within it every decode step is launched in this form, for tests and benchmarks that compare them.

    Args:
        form: "pdl", "cooperative" (of up to 16 tokens, where the shapes allow it) or "auto", which goes by the chip: DecodeForm
            in csrc/decode/ffn_decode.h.
    """
    global _form, _latest
    known, _form, _latest = _form, form, None
    try:
        yield
    finally:
        _form, _latest = known, None


@functools.cache
def _type_codes() -> dict[torch.dtype, int]:
    return {getattr(torch, name): code for name, code in _extension().type_codes.items()}


@functools.cache
def _tensors() -> Callable[[Problem], tuple[Tensor | None, ...]]:
    """Reads the kernel's tensors off a problem, in the struct's order."""
    return operator.attrgetter(*_extension().tensor_names)


@functools.cache
def _chip(index: int) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory of each)."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def _extension() -> Any:
    extension = load()
    assert extension is not None, "choose asks unsupported() first"
    return extension


def unsupported(problem: Problem) -> str | None:
    """Which limit of the decode kernel, the extension or the GPU this problem breaks; None: it breaks none."""
    x = problem.x
    if x.device.type != "cuda":
        return f"x is on {x.device}, and the extension's kernels need an NVIDIA GPU"
    limit = device_limit(x.device.index)
    if limit is not None:
        return limit
    if x.dtype not in _TYPES:
        return f"x is {_name(x.dtype)}, and the decode kernel computes in bfloat16 or float16"
    if problem.rows > _extension().max_tokens:
        return f"x has {problem.rows} tokens, and the decode kernel takes at most {_extension().max_tokens}"
    if problem.dropout_p > 0:
        return f"dropout_p is {problem.dropout_p}, and the decode kernel has no dropout"
    for name in ("visual_map", "visual_drop"):
        if getattr(problem, name):
            return f"{name} is {getattr(problem, name)!r}, and the decode kernel takes scores as they are"
    if problem.visual_activation == IDENTITY:
        return f"visual_activation is {IDENTITY!r}, which the decode kernel does not have"
    if problem.factored and problem.rank == 0:
        return "visual_basis has no rows, and the decode kernel takes an empty tensor for none at all"
    codes = _type_codes()
    for name, tensor in zip(_extension().tensor_names, _tensors()(problem), strict=True):
        if tensor is not None and tensor.dtype not in codes:
            return f"{name} is {_name(tensor.dtype)}, and the decode kernel reads bfloat16, float16 and float32"
    reason: str | None = _prepare(problem).params.unsupported()
    return reason


def is_fast(problem: Problem) -> bool:
    """Whether the kernel reads every large operand of a supported problem 16 bytes at a time; otherwise it is right but slow."""
    return bool(_prepare(problem).params.is_fast())


def forward(problem: Problem, *, save_hidden: bool = False, save_scores: bool = False) -> tuple[Tensor, None, None]:
    """The output of a problem that `unsupported` has nothing against; allocates y and one workspace, synchronises nothing.

    Args:
        problem: checked, with at least one row.
        save_hidden, save_scores: as in the other backends. There is no backward, so nothing can be saved.

    Returns:
        (y (N, d), None, None).

    Raises:
        RuntimeError: the launch failed; says why.
    """
    if save_hidden or save_scores:
        raise RuntimeError(
            "the cuda backend has no backward and keeps nothing for one; use 'triton' or 'torch' to train"
        )
    x = problem.x
    params = _prepare(problem).params
    y = torch.empty((problem.rows, problem.width), dtype=x.dtype, device=x.device)
    workspace = torch.empty(params.workspace_bytes(), dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    params.launch(y=y.data_ptr(), y_stride=problem.width, workspace=workspace.data_ptr(), stream=stream)
    return y, None, None


def _prepare(problem: Problem) -> _Prepared:
    """`problem` as parameters. choose() asks unsupported() and then forward() about one problem, so the latest one is remembered."""
    global _latest
    latest = _latest
    if latest is None or latest.problem() is not problem:
        segments = problem.segments
        indices = [
            None if t is None else t.contiguous() for t in (segments.cu_seqlens, segments.index, segments.lengths)
        ]
        latest = _latest = _Prepared(weakref.ref(problem), _params(problem, *indices), indices)
    return latest


def _params(problem: Problem, cu_seqlens: Tensor | None, index: Tensor | None, lengths: Tensor | None) -> Any:
    """The struct, without outputs."""
    extension, codes, segments = _extension(), _type_codes(), problem.segments
    device = problem.x.device.index
    multiprocessors, shared_bytes = _chip(device)
    tensors = [None if t is None else (t.data_ptr(), codes[t.dtype], *t.stride()) for t in _tensors()(problem)]
    return extension.FfnDecodeParams(
        tuple(tensors),
        type=codes[problem.x.dtype],
        cu_seqlens=_address(cu_seqlens),
        visual_index=_address(index),
        visual_lengths=_address(lengths),
        tokens=problem.rows,
        width=problem.width,
        pairs=problem.pairs,
        slots=problem.slots,
        rank=problem.rank,
        memories=problem.memories,
        sequences=segments.sequences,
        length=segments.length or 0,
        shared_memory=segments.shared,
        activation=extension.activation_codes[problem.activation],
        visual_activation=extension.activation_codes[problem.visual_activation],
        visual_scale=problem.visual_scale,
        form=extension.form_codes[_form],
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
        device=device,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
