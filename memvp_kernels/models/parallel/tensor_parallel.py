"""Tensor parallelism: an FFN whose pairs are spread over ranks, and a memory whose slots are spread with them.

A rank adds its F / tp pairs and M / tp slots into one partial sum, so the layer's own all-reduce covers the memory::

    y = g( fused_ffn(f(x), own pairs, own slots of the cores and positions, f(basis)) ) + value_bias

f is the identity whose backward sums the ranks' gradients; g sums the ranks' results, its backward is the identity. The
memory passes f once per forward, before the layers, so its gradients cross the network once per step. The basis' products,
x Wᵀ and u W, are repeated on every rank: docs/distributed.md has their size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memvp_kernels.autograd import draw_seed
from memvp_kernels.models.memory.visual_memory import Memory

__all__ = [
    "Split",
    "all_reduce",
    "local_part",
    "part_of",
    "rank_local_rng",
    "read_split",
    "shard_slots",
    "share_slots",
    "sum_gradients",
    "tensor_mesh",
]

_TRANSFORMERS = "transformers.distributed.tensor_parallel"


class Split(NamedTuple):
    """How a linear layer is spread over ranks.

    Attributes:
        kind: "columns", each rank a part of the outputs of a whole input; or "rows", each rank a summand of the whole output
            from its part of the input, summed by the layer's own forward.
        mesh: the ranks; one-dimensional.
    """

    kind: str
    mesh: Any


def read_split(linear: nn.Module) -> Split | None:
    """The split that transformers' ``tp_plan`` gave ``linear``; None for any other layer, and for any style but the plain two.

    transformers replaces the instance's forward by a closure over the style object, the mesh and the layer's own forward.
    The three are read from there: they say what the layer does, where a weight's placement says only how it is stored.
    """
    forward = vars(linear).get("forward")
    if getattr(forward, "__module__", None) != _TRANSFORMERS or getattr(forward, "__name__", None) != "tp_forward":
        return None
    code: Any = getattr(forward, "__code__", None)
    cells = dict(zip(code.co_freevars, getattr(forward, "__closure__", None) or (), strict=False))
    try:
        style, mesh, own = (cells[name].cell_contents for name in ("self", "mesh", "original_forward"))
    except (KeyError, ValueError):  # another version's closure
        return None
    if getattr(own, "__func__", None) is not nn.Linear.forward or mesh.ndim != 1:
        return None
    from torch.distributed.tensor import Replicate, Shard

    known = {
        "ColwiseParallel": ("columns", Replicate(), Shard(-1)),
        "RowwiseParallel": ("rows", Shard(-1), Replicate()),
    }
    if type(style).__name__ not in known:
        return None
    kind, *layouts = known[type(style).__name__]
    plain = style.use_local_output and [style.input_layouts, style.output_layouts] == layouts
    return Split(kind, mesh) if plain else None


def tensor_mesh(language_model: nn.Module) -> Any | None:
    """The mesh over which transformers' ``tp_plan`` spread the model's layers; None where it did not."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    splits = (read_split(module) for module in language_model.modules())
    return next((split.mesh for split in splits if split is not None), None)


def local_part(t: Any, split: Split, dim: int | None) -> Tensor | None:
    """This rank's part of a parameter that ``split`` stores as sharded on ``dim`` (None: replicated).

    None where it is stored in any other way.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(t, DTensor) or t.device_mesh != split.mesh:
        return None
    wanted = (Replicate(),) if dim is None else (Shard(dim), Shard(dim - t.ndim))
    return t.to_local() if t.placements[0] in wanted else None


def sum_gradients(t: Tensor, mesh: Any) -> Tensor:
    """f: ``t``, equal on every rank; its gradient is the sum of the ranks'."""
    if not (torch.is_grad_enabled() and t.requires_grad):
        return t
    from torch.distributed.tensor import DTensor, Partial, Replicate

    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def all_reduce(t: Tensor, mesh: Any) -> Tensor:
    """g: the sum of the ranks' ``t``; every rank gets the gradient as it is. ``t`` may be overwritten."""
    if not t.requires_grad:
        dist.all_reduce(t, group=mesh.get_group())
        return t
    from torch.distributed.tensor import DTensor, Partial, Replicate

    partial = DTensor.from_local(t, mesh, [Partial()], run_check=False)
    return partial.redistribute(placements=[Replicate()]).to_local()


def shard_slots(memory: Memory, mesh: Any) -> Memory:
    """This rank's slots of ``memory``. The last ranks have fewer, or none, where tp does not divide M.

    Backward, the ranks' parts of the cores and positions are gathered and their gradients of the basis are summed, so that
    every rank ends with the whole gradient and ranks that started equal stay equal.
    """
    slots = memory.key_position.dim() - 2  # (M, d), or (layers, M, d)
    return replace(
        memory,
        core=_chunk(memory.core, mesh, 1),
        basis=sum_gradients(memory.basis, mesh),
        key_position=_chunk(memory.key_position, mesh, slots),
        value_position=_chunk(memory.value_position, mesh, slots),
        shard=None,
    )


def share_slots(memory: Memory, mesh: Any) -> Memory:
    """All slots of ``memory`` on this rank, which adds its 1/tp of the result.

    For a ``visual_drop``: which of a token's scores are lowest is known from all of them alone. Gradients are those of
    :func:`shard_slots`.
    """
    scales = memory.scale if isinstance(memory.scale, tuple) else (memory.scale,)
    shares = tuple(scale / mesh.size() for scale in scales)
    return replace(
        memory,
        core=sum_gradients(memory.core, mesh),
        basis=sum_gradients(memory.basis, mesh),
        key_position=sum_gradients(memory.key_position, mesh),
        value_position=sum_gradients(memory.value_position, mesh),
        scale=shares if isinstance(memory.scale, tuple) else shares[0],
        shard=None,
    )


def part_of(memory: Memory, mesh: Any) -> Memory:
    """What this rank computes of ``memory``; the sum over the ranks is all of it."""
    return (share_slots if memory.visual_drop > 0 else shard_slots)(memory, mesh)


def _chunk(t: Tensor, mesh: Any, dim: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    replicated = DTensor.from_local(t, mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=[Shard(dim)]).to_local()


@contextlib.contextmanager
def rank_local_rng(mesh: Any, device: torch.device, dropout: float) -> Iterator[None]:
    """Within it, dropout draws bits of this rank's own; afterwards every rank's generator is in the same state.

    A mask is a function of its seed and of the slot's number within the rank, so under one seed slots of different ranks
    would be dropped together.
    """
    rank, ranks = (mesh.get_local_rank(), mesh.size()) if dropout > 0 else (0, 1)
    for _ in range(rank):
        draw_seed(device)
    try:
        yield
    finally:
        for _ in range(ranks - 1 - rank):
            draw_seed(device)
