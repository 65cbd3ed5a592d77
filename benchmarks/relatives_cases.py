"""What MemVP's relatives add to an FFN: ADEM-VL's drop by each way to find a row's threshold; MemVR's branch and probe beside the FFN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measure import Built, Candidate, Truth
from options import Setting
from roofline import Count, FFNShape, ffn_forward, head
from timing import tensor_bytes
from torch import Tensor
from workload import Weights, hidden_states

from memvp_kernels import fused_ffn
from memvp_kernels.dispatch import missing as missing_backend
from memvp_kernels.problem import Segments

_DROP, _SCALE, _ALPHA = 0.1, 0.1, 0.12


def drop_candidates(setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> list[Candidate]:
    """s · A · [A ≥ θ] over kept scores A."""
    rows, slots = sequences * text_length, max(setting.preset.slots, visual_tokens)
    scores = torch.randn(rows, slots, generator=torch.Generator().manual_seed(0)).to(setting.device, setting.dtype)
    dropped = int(_DROP * slots)

    def kernel() -> Tensor:
        from memvp_kernels.backends.triton.device.visual import Visual
        from memvp_kernels.backends.triton.kernels.drop import dropped_visual

        segments = Segments(rows=rows, sequences=sequences, length=text_length)
        return dropped_visual(scores, segments, sequences, _DROP, Visual("identity", _SCALE, None, 0))

    thresholds: dict[str, Callable[[Tensor], Tensor]] = {
        "sort": lambda a: a.sort(dim=-1).values[:, dropped, None],
        "topk": lambda a: a.topk(dropped + 1, dim=-1, largest=False).values[:, -1:],
        "kthvalue": lambda a: a.kthvalue(dropped + 1, dim=-1, keepdim=True).values,
    }

    def masked(threshold: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        a = scores.to(dtype)
        return a * (a >= threshold(a)) * _SCALE

    calls = {
        name: functools.partial(masked, threshold, setting.dtype)
        for name, threshold in thresholds.items()
        if setting.wants(name)
    }
    calls |= {"triton": kernel} if setting.wants("triton") else {}

    def truth() -> Truth:
        return Truth({"visual": calls.get("sort", kernel)()}, {"visual": masked(thresholds["sort"], torch.float64)})

    count = Count(rows * slots, 2 * rows * slots * setting.element)
    missing = missing_backend("triton", setting.device)
    return [
        Candidate(
            name, functools.partial(_built, call, "visual", scores), truth, count,
            missing=missing if name == "triton" else None,
        )
        for name, call in calls.items()
    ]  # fmt: skip


def memvr_candidates(setting: Setting, *, sequences: int, text_length: int, visual_tokens: int) -> list[Candidate]:
    """The FFN, MemVR's branch added to it, and its probe: as here over the last token, as published over all of them."""
    preset, device, dtype = setting.preset, setting.device, setting.dtype
    w = Weights.random(preset, device=device, dtype=dtype, seed=0)
    x = hidden_states(sequences, text_length, preset.width, device=device, dtype=dtype)
    v = hidden_states(sequences, visual_tokens, preset.width, device=device, dtype=dtype)
    vocabulary = torch.randn(preset.vocabulary, preset.width).to(device, dtype) / preset.width**0.5
    key = v / preset.width

    def ffn(x: Tensor, w: Any) -> Tensor:
        return (F.silu(x @ w.gate.T) * (x @ w.key.T)) @ w.value

    def mixed(y: Tensor, found: Tensor) -> Tensor:
        ratio = y.abs().mean((1, 2), keepdim=True) / found.abs().mean((1, 2), keepdim=True)
        return (1 - _ALPHA) * y + _ALPHA * ratio * found

    def branch(dtype: torch.dtype, ours: bool) -> Tensor:
        wide = Weights(**{n: t if t is None else t.to(dtype) for n, t in vars(w).items()})
        xs, keys, values = (t.to(dtype) for t in (x, key, v))
        if ours:
            found = fused_ffn(xs, None, None, keys, values, visual_activation="identity")
        else:
            found = xs @ keys.transpose(1, 2) @ values
        return mixed(ffn(xs, wide), found)

    # Here, for transformers 5.17 to 5.19 look for a package `kernels`, find kernels.py, and import it, and so this file.
    from memvp_kernels.models.relatives.memvr import next_token_entropy

    def probe(dtype: torch.dtype, *, tokens: slice) -> Tensor:
        return next_token_entropy(x[:, tokens].to(dtype) @ vocabulary.to(dtype).T)[:, -1:]

    rows = sequences * text_length
    shape = FFNShape.of(
        preset, sequences=sequences, tokens=text_length, visual_tokens=visual_tokens, element=setting.element
    )
    alone = ffn_forward("text", shape)
    memory = Count(
        4 * rows * visual_tokens * preset.width, 2 * sequences * visual_tokens * preset.width * setting.element
    )
    last, every = slice(-1, None), slice(None)
    calls: dict[str, tuple[Callable[[torch.dtype], Tensor], Count]] = {
        "ffn": (lambda t: ffn(x.to(t), Weights(**{n: m if m is None else m.to(t) for n, m in vars(w).items()})), alone),
        "ffn-and-image": (lambda t: branch(t, ours=t == dtype), alone + memory),
        "probe": (functools.partial(probe, tokens=last), head(preset, rows=sequences, element=setting.element)),
        "probe-published": (functools.partial(probe, tokens=every), head(preset, rows=rows, element=setting.element)),
    }

    def truth(name: str) -> Truth:
        call = calls[name][0]
        plain = branch(dtype, ours=False) if name == "ffn-and-image" else call(dtype)
        return Truth({"out": plain}, {"out": call(torch.float64)})

    return [
        Candidate(
            name, functools.partial(_built, functools.partial(call, dtype), "out", x, v, w, vocabulary),
            functools.partial(truth, name), count,
        )
        for name, (call, count) in calls.items()
        if setting.wants(name)
    ]  # fmt: skip


def _built(call: Callable[[], Tensor], name: str, *held: object) -> Built:
    return Built(lambda: {name: call()}, [call], tensor_bytes(*held), graph=False)
