"""Each Triton kernel alone: its launch by each implementation, and the bare matrix products that it contains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import Built, Candidate, Truth
from options import Setting
from roofline import FFNShape, kernel
from timing import tensor_bytes
from torch import Tensor
from variants import materialize
from workload import Adapter, Weights, hidden_states

from memvp_kernels.dispatch import missing as missing_backend
from memvp_kernels.problem import Segments

#: Of a plain memory, and of a factored one: [u | visual] and the scores from x's columns; [t | dS] and [u | visual] from dy's.
KERNELS = ("hidden", "output", "dhidden", "dinput", "dmemory", "core", "dcore")
_ONE_IMPLEMENTATION = ("dmemory", "core", "dcore")

#: Variant → the large products' implementation, and what a reader should know.
IMPLEMENTATIONS = {
    "triton": ("fused", ""),
    "cublas": ("cublas", "the shared products by torch.mm, with the backend's passes and memory kernels around them"),
    "cuda": ("hopper", "the shared products by the extension's kernels for Hopper, the memory's own beside them"),
}
Outputs = dict[str, Tensor]


class Operands:
    """Everything that flows between the kernels, from plain PyTorch, rounded once to the dtype."""

    def __init__(self, setting: Setting, shape: FFNShape) -> None:
        device, dtype, preset = setting.device, setting.dtype, setting.preset
        s, t = shape.sequences, shape.tokens
        adapter = Adapter(preset, slots=shape.slots, device=device)
        factors = adapter.factors(adapter.batch(s, shape.visual_tokens), dtype=dtype).map(Tensor.detach)
        self.memory = materialize(factors)
        self.core, self.scale, self.rank = factors.core, factors.scale, factors.core.shape[-1]
        self.weights = Weights.random(preset, device=device, dtype=dtype, seed=0)
        make = functools.partial(hidden_states, s, t, preset.width, device=device, dtype=dtype)
        self.x, self.grad = make().flatten(0, 1), make(offset=5000).flatten(0, 1)
        self.segments = Segments(rows=s * t, sequences=s, length=t)
        self.images, self.dtype = s, dtype

        def columns(rows: Tensor, position: Tensor) -> Tensor:
            return (rows.float() @ torch.cat([factors.basis, position]).float().T).to(dtype)

        self.c, self.e = columns(self.x, factors.key_position), columns(self.grad, factors.value_position)
        for name in ("hidden", "dhidden"):
            for field, tensor in self.reference(name, torch.float32).items():
                setattr(self, field, tensor.to(dtype))
        self.core_scores = self.reference("core", torch.float32)["scores"].to(dtype)

    def per_image(self, t: Tensor) -> Tensor:
        return t.view(self.images, -1, t.shape[-1])

    def reference(self, name: str, dtype: torch.dtype) -> Outputs:
        """What a kernel computes, in plain PyTorch ops of any dtype."""
        wide: Any = _In(self, dtype)
        w, kv, vv, scale = wide.weights, wide.memory.key, wide.memory.value, self.scale

        def derivative(scores: Tensor) -> Tensor:
            share = torch.sigmoid(scores)
            return share + scores * share * (1 - share)

        def core_scores(columns: Tensor) -> Tensor:
            columns = self.per_image(columns)
            return columns[..., self.rank :] + columns[..., : self.rank] @ wide.core.transpose(1, 2)

        def joined(t: Tensor) -> Tensor:
            return torch.cat([t @ wide.core, t], -1).flatten(0, 1)

        if name == "hidden":
            gate, up = wide.x @ w.gate.T, wide.x @ w.key.T
            scores = (self.per_image(wide.x) @ kv.transpose(1, 2)).flatten(0, 1)
            pre, visual = torch.stack([gate, up]), scale * F.silu(scores)
            return {"pre": pre, "hidden": F.silu(gate) * up, "scores": scores, "visual": visual}
        if name == "output":
            return {"y": wide.hidden @ w.value + (self.per_image(wide.visual) @ vv).flatten(0, 1)}
        if name == "dhidden":
            dhidden, (gate, up) = wide.grad @ w.value.T, wide.pre
            dvisual = scale * (self.per_image(wide.grad) @ vv.transpose(1, 2)).flatten(0, 1)
            dpre = torch.stack([dhidden * up * derivative(gate), dhidden * F.silu(gate)])
            return {"dpre": dpre, "dscores": dvisual * derivative(wide.scores)}
        if name == "dinput":
            dvisual = (self.per_image(wide.dscores) @ kv).flatten(0, 1)
            return {"dx": wide.dpre[0] @ w.gate + wide.dpre[1] @ w.key + dvisual}
        if name == "dmemory":
            left = (self.per_image(t).transpose(1, 2) for t in (wide.dscores, wide.visual))
            right = (self.per_image(t) for t in (wide.x, wide.grad))
            return dict(zip(("dkey", "dvalue"), map(torch.matmul, left, right), strict=True))
        if name == "core":
            scores = core_scores(wide.c)
            return {"middle": joined(scale * F.silu(scores)), "scores": scores.flatten(0, 1)}
        scores = self.per_image(wide.core_scores)
        return {
            "key": joined(scale * core_scores(wide.e) * derivative(scores)),
            "value": joined(scale * F.silu(scores)),
        }

    def launch(self, name: str, implementation: str) -> Callable[[], Outputs]:
        """The launch of a kernel, or another implementation's products in its place."""
        from memvp_kernels.backends.triton.device.visual import Visual
        from memvp_kernels.backends.triton.gemm import IMPLEMENTATIONS as BY_NAME
        from memvp_kernels.backends.triton.kernels.core import core_forward
        from memvp_kernels.backends.triton.kernels.core_backward import core_backward
        from memvp_kernels.backends.triton.kernels.dmemory import memory_gradients

        if implementation == "hopper":
            from memvp_kernels.backends.cuda.gemm import STEPS as steps
        else:
            steps = BY_NAME[implementation]
        own: Any = self
        w, memory, segments, visual = self.weights, self.memory, self.segments, Visual("silu", self.scale, None, 0)

        def hidden() -> Outputs:
            saved = {"save_hidden": True, "save_scores": True}
            found = steps.hidden(self.x, w.key, w.gate, None, None, "silu", memory.key, segments, visual, **saved)
            return {field: getattr(found, field) for field in ("pre", "hidden", "scores", "visual")}

        def output() -> Outputs:
            return {"y": steps.output(own.hidden, w.value, None, own.visual, memory.value, segments, None, self.x)}

        def dhidden() -> Outputs:
            of_memory = (memory.value, self.images, own.scores, segments, visual)
            found = steps.dhidden(self.grad, w.value, own.pre, "silu", *of_memory, need_visual=True, overwrite=False)
            return {"dpre": found.dpre, "dscores": found.dscores}

        def dinput() -> Outputs:
            return {"dx": steps.dinput(own.dpre, w.key, w.gate, own.dscores, memory.key, segments, self.x)}

        def dmemory() -> Outputs:
            pairs = [(own.dscores, self.x), (own.visual, self.grad)]
            return dict(
                zip(("dkey", "dvalue"), memory_gradients(pairs, segments, self.images, self.dtype), strict=True)
            )

        def core() -> Outputs:
            kept = {"value_position": True, "save_scores": True}
            return dict(
                zip(
                    ("middle", "scores"),
                    core_forward(self.c, self.core, self.core, segments, visual, **kept),
                    strict=True,
                )
            )  # type: ignore[arg-type]

        def dcore() -> Outputs:
            needs = dict.fromkeys(("need_key", "need_value", "through_key", "through_value"), True)
            found = core_backward(self.e, self.core_scores, self.core, self.core, segments, visual, **needs)
            return {"key": found.key, "value": found.value}  # type: ignore[dict-item]

        return {f.__name__: f for f in (hidden, output, dhidden, dinput, dmemory, core, dcore)}[name]

    def products(self, name: str) -> Callable[[], object]:
        """The matrix products that a kernel contains, as cuBLAS computes them, the per-image ones batched."""
        own: Any = self
        w, memory, core_t = self.weights, self.memory, self.core.transpose(1, 2)
        x, grad, visual, dscores = (self.per_image(t) for t in (self.x, self.grad, own.visual, own.dscores))
        c, e = (self.per_image(t)[..., : self.rank] for t in (self.c, self.e))
        scores = self.per_image(self.core_scores)  # stands for visual and dS, which have its shape
        kv, vv = memory.key.transpose(1, 2), memory.value.transpose(1, 2)
        pairs = {
            "hidden": [(self.x, w.gate.T), (self.x, w.key.T), (x, kv)],
            "output": [(own.hidden, w.value), (visual, memory.value)],
            "dhidden": [(self.grad, w.value.T), (grad, vv)],
            "dinput": [(own.dpre[0], w.gate), (own.dpre[1], w.key), (dscores, memory.key)],
            "dmemory": [(dscores.transpose(1, 2), x), (visual.transpose(1, 2), grad)],
            "core": [(c, core_t), (scores, self.core)],
            "dcore": [(e, core_t), (scores, self.core), (scores, self.core)],
        }[name]
        return lambda: [left @ right for left, right in pairs]


class _In:
    """Operands converted to a dtype as they are read."""

    def __init__(self, operands: Operands, dtype: torch.dtype) -> None:
        self._operands, self._dtype = operands, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._operands, name)
        if isinstance(found, Tensor):
            return found.to(self._dtype)
        return type(found)(*(t.to(self._dtype) if isinstance(t, Tensor) else t for t in vars(found).values()))


def _missing_hopper(setting: Setting) -> str | None:
    from memvp_kernels.backends.cuda.extension import hopper_limit

    return missing_backend("cuda", setting.device) or hopper_limit(setting.device.index)


def candidates(setting: Setting, name: str, *, sequences: int, text_length: int, visual_tokens: int) -> list[Candidate]:
    """One kernel by each implementation, and the products within it; the operands are made when the first of them needs them."""
    sizes = {"sequences": sequences, "tokens": text_length, "visual_tokens": visual_tokens}
    shape = FFNShape.of(setting.preset, **sizes, element=setting.element)
    operands = functools.cache(lambda: Operands(setting, shape))
    count = kernel(name, shape)

    def truth() -> Truth:
        return Truth(operands().reference(name, setting.dtype), operands().reference(name, torch.float64))

    def held() -> int:
        return tensor_bytes(*(vars(operands()).values()))

    def launched(implementation: str) -> Built:
        call = operands().launch(name, implementation)
        return Built(call, [call], held())

    def products() -> Built:
        return Built(lambda: operands().reference(name, setting.dtype), [operands().products(name)], held())

    def found() -> Iterator[Candidate]:
        yield Candidate(
            "matmul", products, truth, count, note="the kernel's matrix products alone, one after the other"
        )
        for variant, (implementation, note) in IMPLEMENTATIONS.items():
            if setting.wants(variant) and (variant == "triton" or name not in _ONE_IMPLEMENTATION):
                missing = (
                    missing_backend("triton", setting.device)
                    or (variant == "cuda" and _missing_hopper(setting))
                    or None
                )
                build = functools.partial(launched, implementation)
                yield Candidate(variant, build, truth, count, missing=missing, note=note)

    return list(found())
