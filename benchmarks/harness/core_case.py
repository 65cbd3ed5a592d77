"""The two kernels of a factored memory's cores, against their floor and the bare matrix products they contain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cli import Setting
from harness.inputs import hidden_states
from harness.kernel_candidates import Outputs, of_kernel
from harness.measure import Candidate, held_bytes
from harness.operands import Adapter
from harness.rooflines import FFNShape
from memvp_kernels.problem import Segments

__all__ = ["KERNELS", "candidates"]

#: [u | visual] and the scores from x's columns; [t | dS] and [u | visual] from dy's.
KERNELS = ("core", "dcore")


class _Operands:
    """What the shared products hand to the core kernels, from plain PyTorch, rounded once to the dtype."""

    def __init__(self, setting: Setting, shape: FFNShape) -> None:
        device, dtype, preset = setting.device, setting.dtype, setting.preset
        s, t = shape.sequences, shape.tokens
        adapter = Adapter(preset, slots=shape.slots, device=device)
        parts = adapter.parts(adapter.batch(s, shape.visual_tokens), dtype=dtype).map(Tensor.detach)
        self.core, self.scale, self.rank = parts.core, parts.scale, parts.core.shape[-1]
        self.segments = Segments(rows=s * t, sequences=s, length=t)

        def columns(rows: Tensor, position: Tensor) -> Tensor:
            wide = torch.cat([parts.basis, position]).float()
            return (rows.float() @ wide.T).flatten(0, 1).to(dtype)

        x = hidden_states(s, t, preset.width, device=device, dtype=dtype)
        grad = hidden_states(s, t, preset.width, device=device, dtype=dtype, offset=5000)
        self.c, self.e = columns(x, parts.key_position), columns(grad, parts.value_position)
        self.scores = self.reference("core", torch.float32)["scores"].to(dtype)

    def reference(self, name: str, dtype: torch.dtype) -> Outputs:
        """What a kernel computes, in plain PyTorch ops of any dtype."""
        core = self.core.to(dtype)

        def scored(columns: Tensor) -> Tensor:
            wide = columns.to(dtype).view(core.shape[0], -1, columns.shape[-1])
            return wide[..., self.rank :] + wide[..., : self.rank] @ core.transpose(1, 2)

        if name == "core":
            scores = scored(self.c)
            visual = self.scale * F.silu(scores)
            middle = torch.cat([visual @ core, visual], -1)
            return {"middle": middle.flatten(0, 1), "scores": scores.flatten(0, 1)}
        scores = self.scores.to(dtype).view(core.shape[0], -1, core.shape[1])
        share = torch.sigmoid(scores)
        visual = self.scale * F.silu(scores)
        dscores = self.scale * scored(self.e) * (share + scores * share * (1 - share))
        return {
            "key": torch.cat([dscores @ core, dscores], -1).flatten(0, 1),
            "value": torch.cat([visual @ core, visual], -1).flatten(0, 1),
        }

    def triton(self, name: str, road: str) -> Callable[[], Outputs]:
        """The launch of a kernel; there is one road."""
        from memvp_kernels.backends.triton.device.visual import Visual
        from memvp_kernels.backends.triton.kernels.core import core_forward
        from memvp_kernels.backends.triton.kernels.core_backward import core_backward

        visual = Visual("silu", self.scale, None, 0)

        def forward() -> Outputs:
            middle, scores = core_forward(
                self.c, self.core, self.core, self.segments, visual, value_position=True, save_scores=True
            )
            assert scores is not None
            return {"middle": middle, "scores": scores}

        def backward() -> Outputs:
            made = core_backward(
                self.e,
                self.scores,
                self.core,
                self.core,
                self.segments,
                visual,
                need_key=True,
                need_value=True,
                through_key=True,
                through_value=True,
            )
            return {"key": made.key, "value": made.value}  # type: ignore[dict-item]

        return forward if name == "core" else backward

    def products(self, name: str) -> Callable[[], object]:
        """The matrix products that a kernel contains, batched over the images."""
        core = self.core
        c, e = (t.view(core.shape[0], -1, t.shape[-1])[..., : self.rank] for t in (self.c, self.e))
        scores = self.scores.view(core.shape[0], -1, core.shape[1])  # stands for visual and dS, which have its shape
        if name == "core":
            return lambda: [c @ core.transpose(1, 2), scores @ core]
        return lambda: [e @ core.transpose(1, 2), scores @ core, scores @ core]

    def held(self, name: str) -> int:
        """Bytes of what a kernel reads."""
        return held_bytes(self.core, self.c) if name == "core" else held_bytes(self.core, self.e, self.scores)


def candidates(setting: Setting, name: str, **sizes: int) -> list[Candidate]:
    """One kernel and the products within it, see `of_kernel`."""
    return of_kernel(_Operands, ("fused",), setting, name, **sizes)
