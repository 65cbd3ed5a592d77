"""How much of each FFN's output is the memory's, and which slots it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memvp_kernels.backends.torch.activations import activate
from memvp_kernels.checks import IDENTITY
from memvp_kernels.models.patching.binding import Binding, bound
from memvp_kernels.models.patching.mixins import MemoryFFN
from memvp_kernels.models.patching.weights import activation_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerAttribution", "MemoryAttribution", "MemoryRecorder"]


@dataclass(frozen=True)
class LayerAttribution:
    """One FFN with memory, in one forward pass.

    With m = Σ_j s·vact(x·Kv_j)·Vv_j, the memory's part of the FFN's output y:

    Attributes:
        name: of the FFN in the language model.
        share: (B, T), ‖m‖ / (‖m‖ + ‖y − m‖), 0 where the memory adds nothing and 1 where the FFN's own part is nothing.
        slots: (B, T, M), ‖s·vact(x·Kv_j)·Vv_j‖, what slot j adds.
        valid: (B, T) bool, False on padding.
    """

    name: str
    share: Tensor
    slots: Tensor
    valid: Tensor

    def mean_share(self) -> Tensor:
        """(B,): :attr:`share` averaged over each sample's tokens; 0 for a sample without tokens."""
        return _token_mean(self.share.unsqueeze(-1), self.valid).squeeze(-1)

    def mean_slots(self) -> Tensor:
        """(B, M): :attr:`slots` averaged over each sample's tokens."""
        return _token_mean(self.slots, self.valid)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k slots that add most to each token: their norms and indices, (B, T, k) each, greatest first.

        Raises:
            ValueError: k is not in [1, M].
        """
        return _top(self.slots, k)


@dataclass(frozen=True)
class MemoryAttribution:
    """What :meth:`MemVPModel.explain_memory` found.

    Attributes:
        layers: one entry per FFN with memory, in the order in which they run.
        visual_tokens: (B,), the slots that hold the image; those past it are free learned memory.
        pooled_grids: of the configuration.
    """

    layers: tuple[LayerAttribution, ...]
    visual_tokens: Tensor
    pooled_grids: tuple[int, ...] = ()

    def shares(self) -> Tensor:
        """(B, layers): each layer's share, averaged over the sample's tokens."""
        return torch.stack([layer.mean_share() for layer in self.layers], dim=1)

    def slots(self) -> Tensor:
        """(B, M): what each slot adds, averaged over the sample's tokens and summed over layers."""
        return torch.stack([layer.mean_slots() for layer in self.layers]).sum(dim=0)

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k slots that add most over all tokens and layers: norms and indices, (B, k) each, greatest first.

        Raises:
            ValueError: k is not in [1, M].
        """
        return _top(self.slots(), k)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        shares = self.shares().mean(dim=0)
        lines = [f"{'feed-forward':<{width}}  memory's share"]
        lines += [f"{layer.name:<{width}}  {share:13.1%}" for layer, share in zip(self.layers, shares, strict=True)]
        return "\n".join(lines)

    def plot(
        self,
        image: Tensor,
        *,
        sample: int = 0,
        grid: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        path: str | Path | None = None,
    ) -> Figure:
        """The image with what each of its patches adds, per layer, and the layers' shares as bars.

        Args:
            image: (height, width), (height, width, 3) or (3, height, width), values that imshow takes.
            sample: which of the batch.
            grid: (rows, columns) of patches; default: square. Pooled grids are laid over each other, a cell's part spread over it.
            layers: positions in :attr:`layers` to show; default: all, at most six, spread evenly.
            path: where to save the figure, if anywhere.

        Returns:
            The matplotlib figure (the ``plots`` extra).

        Raises:
            IndexError: no such sample or layer.
            ValueError: the sample has no image, or ``grid`` is not that of its visual tokens.
        """
        from memvp_kernels.models import attribution_plot

        return attribution_plot.draw(self, image, sample=sample, grid=grid, layers=layers, path=path)


class MemoryRecorder:
    """An observer of one forward that takes the memory apart, slot by slot, which a forward itself never does.

    Costs B·T·M numbers per layer, and a materialised memory (R, M, d) of one layer at a time.

    Args:
        ffns: those with memory, and their names, in the order in which they run.
        rank: of the core's factors; its column after those is 1 on rows that hold a visual token.
        pooled_grids: of the configuration.
        encoder_mask, decoder_mask: (B, T); the zeros of the mask of an FFN's side are left out of every average.
    """

    def __init__(
        self,
        ffns: Sequence[tuple[str, MemoryFFN]],
        rank: int,
        *,
        pooled_grids: tuple[int, ...] = (),
        encoder_mask: Tensor | None = None,
        decoder_mask: Tensor | None = None,
        encoder_decoder: bool = False,
    ) -> None:
        self._ffns = ffns
        self._rank = rank
        self._pooled_grids = pooled_grids
        self._masks = {False: encoder_mask, True: decoder_mask}
        self._encoder_decoder = encoder_decoder
        self._found: dict[int, LayerAttribution] = {}
        self._visual_tokens: Tensor | None = None

    def __call__(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Measure one FFN: its position, its input and its output."""
        binding = bound()
        assert binding is not None
        name, ffn = self._ffns[layer]
        core = _rows(binding.memory.core, binding.index, x.shape[0])
        if self._visual_tokens is None:
            self._visual_tokens = (core[..., self._rank] != 0).sum(dim=-1).cpu()
        share, slots = _take_apart(ffn, binding, core, x, y)
        mask = self._masks[self._encoder_decoder and "decoder" in name.split(".")]
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        self._found[layer] = LayerAttribution(name=name, share=share.cpu(), slots=slots.cpu(), valid=valid.cpu())

    def result(self) -> MemoryAttribution:
        """What was measured, on the CPU in float32."""
        assert self._visual_tokens is not None
        layers = tuple(self._found[layer] for layer in sorted(self._found))
        return MemoryAttribution(layers, self._visual_tokens, self._pooled_grids)


def _rows(core: Tensor, index: Tensor | None, samples: int) -> Tensor:
    """(B, M, r): each sample's core; zeros for a sample that reads none."""
    if index is None:
        return core.expand(samples, -1, -1)
    inside = (index >= 0) & (index < core.shape[0])
    return core[index.where(inside, 0)] * inside[:, None, None]


def _take_apart(ffn: MemoryFFN, binding: Binding, core: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """share (B, T) and slots (B, T, M) of one FFN, in float32."""
    memory, index = binding.memory, binding.index
    key_position, value_position = memory.positions(binding.layer)
    rows = core.float() @ memory.basis.float()
    key, value = rows + key_position.float(), rows + value_position.float()
    activation, mapping = (
        memory.visual_activation or activation_name(ffn.ffn_activation()),
        memory.visual_map or IDENTITY,
    )
    assert activation is not None
    scores = activate(mapping, x.float()) @ activate(mapping, key).transpose(1, 2)
    lowest = int(memory.visual_drop * scores.shape[-1])
    kept = scores >= scores.kthvalue(lowest + 1, dim=-1, keepdim=True).values if lowest else 1.0
    reads = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if index is not None:
        reads = (index >= 0) & (index < memory.core.shape[0])
    visual = memory.scale_of(binding.layer) * activate(activation, scores) * kept * reads[:, None, None]
    added = visual @ value
    norm, rest = added.norm(dim=-1), (y.float() - added).norm(dim=-1)
    share = norm / (norm + rest).clamp_min(torch.finfo(torch.float32).tiny)
    return share, visual.abs() * value.norm(dim=-1).unsqueeze(1)


def _token_mean(values: Tensor, valid: Tensor) -> Tensor:
    """(B, T, k) to (B, k) over valid tokens."""
    kept = values * valid.unsqueeze(-1)
    return kept.sum(dim=1) / valid.sum(dim=1).clamp_min(1).unsqueeze(-1)


def _top(slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if not 1 <= k <= slots.shape[-1]:
        raise ValueError(f"k must be in [1, {slots.shape[-1]}], the number of slots, got {k}")
    norms, indices = slots.topk(k, dim=-1)
    return norms, indices
