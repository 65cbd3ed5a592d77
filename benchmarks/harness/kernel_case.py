"""Each Triton kernel of a gated FFN with formed memory alone, against its floor and the bare matrix products it contains."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.cli import ROADS, Setting
from harness.inputs import hidden_states
from harness.kernel_candidates import Outputs, of_kernel
from harness.measure import Candidate, held_bytes
from harness.operands import Adapter, Weights
from harness.rooflines import FFNShape
from harness.variants import Formed
from memvp_kernels.problem import Segments

__all__ = ["KERNELS", "candidates"]

KERNELS = ("hidden", "output", "dhidden", "dinput", "dmemory")


class _Operands:
    """Everything that flows between the five kernels, from plain PyTorch, rounded once to the dtype."""

    def __init__(self, setting: Setting, shape: FFNShape) -> None:
        device, dtype, preset = setting.device, setting.dtype, setting.preset
        s, t = shape.sequences, shape.tokens
        adapter = Adapter(preset, slots=shape.slots, device=device)
        parts = adapter.parts(adapter.batch(s, shape.visual_tokens), dtype=dtype).map(Tensor.detach)
        f = parts.features()
        self.memory = Formed(f + parts.key_position, f + parts.value_position, parts.scale)
        self.weights = Weights.random(preset, device=device, dtype=dtype, seed=0)
        self.x = hidden_states(s, t, preset.width, device=device, dtype=dtype).flatten(0, 1)
        self.grad = hidden_states(s, t, preset.width, device=device, dtype=dtype, offset=5000).flatten(0, 1)
        self.segments = Segments(rows=s * t, sequences=s, length=t)
        self.images = s
        self.dtype = dtype
        made = self.reference("hidden", torch.float32)
        self.pre, self.scores = made["pre"].to(dtype), made["scores"].to(dtype)
        self.hidden, self.visual = made["hidden"].to(dtype), made["visual"].to(dtype)
        made = self.reference("dhidden", torch.float32)
        self.dpre, self.dscores = made["dpre"].to(dtype), made["dscores"].to(dtype)

    def reference(self, name: str, dtype: torch.dtype) -> Outputs:
        """What a kernel computes, in plain PyTorch ops of any dtype."""
        w = Weights(*(t.to(dtype) for t in self.weights.tensors))
        scale = self.memory.scale
        kv, vv = self.memory.key.to(dtype), self.memory.value.to(dtype)

        def per_image(t: Tensor) -> Tensor:
            return t.to(dtype).view(self.images, -1, t.shape[-1])

        if name == "hidden":
            x = self.x.to(dtype)
            gate, up = x @ w.gate.T, x @ w.key.T
            scores = (per_image(self.x) @ kv.transpose(1, 2)).flatten(0, 1)
            return {
                "pre": torch.stack([gate, up]),
                "hidden": F.silu(gate) * up,
                "scores": scores,
                "visual": scale * F.silu(scores),
            }
        if name == "output":
            return {"y": self.hidden.to(dtype) @ w.value + (per_image(self.visual) @ vv).flatten(0, 1)}
        if name == "dhidden":
            grad = self.grad.to(dtype)
            dhidden = grad @ w.value.T
            gate, up = self.pre.to(dtype)
            share, scores = torch.sigmoid(gate), self.scores.to(dtype)
            visual_share = torch.sigmoid(scores)
            dvisual = scale * (per_image(self.grad) @ vv.transpose(1, 2)).flatten(0, 1)
            return {
                "dpre": torch.stack([dhidden * up * (share + gate * share * (1 - share)), dhidden * F.silu(gate)]),
                "dscores": dvisual * (visual_share + scores * visual_share * (1 - visual_share)),
            }
        if name == "dinput":
            gate, up = self.dpre.to(dtype)
            return {"dx": gate @ w.gate + up @ w.key + (per_image(self.dscores) @ kv).flatten(0, 1)}
        return {
            "dkey": per_image(self.dscores).transpose(1, 2) @ per_image(self.x),
            "dvalue": per_image(self.visual).transpose(1, 2) @ per_image(self.grad),
        }

    def triton(self, name: str, road: str) -> Callable[[], Outputs]:
        """The launch of a kernel, or the library's products in its place."""
        from memvp_kernels.backends.triton.device.visual import Visual
        from memvp_kernels.backends.triton.gemm import IMPLEMENTATIONS
        from memvp_kernels.backends.triton.kernels.dmemory import memory_gradients

        steps = IMPLEMENTATIONS[road]
        w, memory, segments = self.weights, self.memory, self.segments
        visual = Visual("silu", memory.scale, None, 0)

        def hidden() -> Outputs:
            made = steps.hidden(
                self.x,
                w.key,
                w.gate,
                None,
                None,
                "silu",
                memory.key,
                segments,
                visual,
                save_hidden=True,
                save_scores=True,
            )
            return {"pre": made.pre, "hidden": made.hidden, "scores": made.scores, "visual": made.visual}  # type: ignore[dict-item]

        def output() -> Outputs:
            return {"y": steps.output(self.hidden, w.value, None, self.visual, memory.value, segments, None, self.x)}

        def dhidden() -> Outputs:
            made = steps.dhidden(
                self.grad,
                w.value,
                self.pre,
                "silu",
                memory.value,
                self.images,
                self.scores,
                segments,
                visual,
                need_visual=True,
                overwrite=False,
            )
            return {"dpre": made.dpre, "dscores": made.dscores}  # type: ignore[dict-item]

        def dinput() -> Outputs:
            return {"dx": steps.dinput(self.dpre, w.key, w.gate, self.dscores, memory.key, segments, self.x)}

        def dmemory() -> Outputs:
            pairs = [(self.dscores, self.x), (self.visual, self.grad)]
            dkey, dvalue = memory_gradients(pairs, segments, self.images, self.dtype)
            return {"dkey": dkey, "dvalue": dvalue}

        return {"hidden": hidden, "output": output, "dhidden": dhidden, "dinput": dinput, "dmemory": dmemory}[name]

    def products(self, name: str) -> Callable[[], object]:
        """The matrix products that a kernel contains, as cuBLAS does them, the per-image ones batched."""
        w, memory = self.weights, self.memory
        x, grad, visual, dscores = (
            t.view(self.images, -1, t.shape[-1]) for t in (self.x, self.grad, self.visual, self.dscores)
        )
        kv, vv = memory.key.transpose(1, 2), memory.value.transpose(1, 2)
        calls: dict[str, list[Callable[[], object]]] = {
            "hidden": [lambda: self.x @ w.gate.T, lambda: self.x @ w.key.T, lambda: x @ kv],
            "output": [lambda: self.hidden @ w.value, lambda: visual @ memory.value],
            "dhidden": [lambda: self.grad @ w.value.T, lambda: grad @ vv],
            "dinput": [lambda: self.dpre[0] @ w.gate, lambda: self.dpre[1] @ w.key, lambda: dscores @ memory.key],
            "dmemory": [lambda: dscores.transpose(1, 2) @ x, lambda: visual.transpose(1, 2) @ grad],
        }
        return lambda: [call() for call in calls[name]]

    def held(self, name: str) -> int:
        """Bytes of what a kernel reads."""
        formed = (self.pre, self.scores, self.hidden, self.visual, self.dpre, self.dscores)
        return held_bytes(self.weights, self.memory, self.x, self.grad, *formed)


def candidates(setting: Setting, name: str, **sizes: int) -> list[Candidate]:
    """One kernel and the products within it, see `of_kernel`."""
    # The memory's gradients have one kernel on every road.
    return of_kernel(_Operands, ("fused",) if name == "dmemory" else ROADS, setting, name, **sizes)
