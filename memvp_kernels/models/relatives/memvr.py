"""MemVR (arXiv 2410.03577) on LLaVA: where the model is unsure of its next token, the next layer's FFN reads the image once more.

Nothing is trained. After each layer of a range the head looks at the last token; if its ten likeliest successors have a normalized entropy
above a threshold, the next layer's FFN output y0 becomes (1 − α) y0 + α D mean|y0| / mean|D|, D = φ(x (c1 v)ᵀ) (c2 v) over the image's tokens v.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memvp_kernels.ffn import fused_ffn

__all__ = ["next_token_entropy", "visual_retracing"]

_LIKELIEST = 10
_PHI = ("identity", "silu")


@contextmanager
def visual_retracing(
    model: nn.Module,
    *,
    alpha: float = 0.12,
    threshold: float = 0.75,
    layers: tuple[int, int] = (5, 16),
    phi: str = "identity",
) -> Iterator[None]:
    """Within it, in this thread, the model's forward and generate look at the image again where they are unsure.

    In a batch every sample has its own entropy, image and mean; padding counts for none of them. In every forward, of a prompt or of one
    more token, a sample's FFN is changed once at most. A sample without an image, or whose image is all zero, is left as it is. A sample's
    several images count as one. Each layer of the range costs one row of the head for every sample until all of them are settled.

    Args:
        model: transformers' LlavaForConditionalGeneration; what it is given must include ``input_ids``.
        alpha: α, the image's share in the changed output, in [0, 1].
        threshold: τ, held against the entropy of the ten likeliest next tokens over its maximum, log 10.
        layers: (start, end): layers strictly between them are looked at, and the one after it is changed.
        phi: φ, "identity" as published for LLaVA, or "silu".

    Raises:
        TypeError: another model.
        ValueError: an argument out of range.
        RuntimeError: a block inside another one over the same model, or a forward that records gradients.
    """
    retracing = _Retracing(model, alpha, threshold, layers, phi)
    known = _active.retracings
    if any(r.model() is model for r in known):
        raise RuntimeError(
            "visual_retracing: wanted one block at a time over a model, got one inside another; leave the outer one first"
        )
    _active.retracings = (*known, retracing)
    handles = retracing.attach(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _active.retracings = known


def next_token_entropy(logits: Tensor) -> Tensor:
    """The entropy of the ten likeliest tokens among themselves over log 10: (…,) in float32 from logits (…, vocabulary)."""
    likeliest = logits.float().topk(_LIKELIEST, dim=-1).values.log_softmax(-1)
    return -(likeliest.exp() * likeliest).sum(-1) / math.log(_LIKELIEST)


class _Active(threading.local):
    def __init__(self) -> None:
        self.retracings: tuple[_Retracing, ...] = ()


_active = _Active()


class _Retracing:
    """One block's settings, the images of the prompt that is being answered, and how far the current forward has come.

    Attributes:
        memory: v / mean|v| (S, M, d), zero past the lengths, and these lengths (S,) int32; None without an image.
        tokens: (S, T) bool, the tokens of this forward that are no padding; None: all of them.
        unsettled: (S,) bool, the samples whose FFN may still be changed in this forward; None: nobody's.
        pending: (S,) bool, those whose next FFN is to be changed.
    """

    def __init__(self, model: nn.Module, alpha: float, threshold: float, layers: tuple[int, int], phi: str) -> None:
        if type(model).__name__ != "LlavaForConditionalGeneration":
            raise TypeError(
                f"model: wanted transformers' LlavaForConditionalGeneration, got {type(model).__name__}; MemVR reads the visual tokens of its prompt"
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: wanted a share in [0, 1], got {alpha}; 0 changes nothing")
        if phi not in _PHI:
            raise ValueError(f"phi: wanted one of {', '.join(_PHI)}, got {phi!r}; LLaVA's is 'identity'")
        count = len(model.model.language_model.layers)  # type: ignore[union-attr,arg-type]
        start, end = layers
        if not 0 <= start < end:
            raise ValueError(
                f"layers: wanted 0 <= start < end, got {layers}; the layers strictly between them are looked at"
            )
        if start + 2 > min(end, count - 1):
            raise ValueError(
                f"layers: wanted a layer strictly between start and end with one after it, got {layers} of {count} layers"
            )
        self.model = weakref.ref(model)
        self.alpha, self.threshold, self.phi = float(alpha), float(threshold), phi
        self.looked_at = range(start + 1, min(end, count - 1))
        self.thread = threading.get_ident()
        self.scales: dict[int, Tensor] = {}
        self.image_tokens: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None
        self.tokens: Tensor | None = None
        self.unsettled: Tensor | None = None
        self.pending: Tensor | None = None

    def attach(self, model: Any) -> list[Any]:
        """Hooks on the modules that it watches; each acts in this thread alone."""
        text = model.model.language_model
        handles = [
            model.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            text.register_forward_pre_hook(self._before_layers, with_kwargs=True),
        ]
        for i in self.looked_at:
            handles.append(text.layers[i].register_forward_hook(self._after_layer))
            handles.append(text.layers[i + 1].mlp.register_forward_hook(self._after_ffn))
        return handles

    def _is_elsewhere(self) -> bool:
        return threading.get_ident() != self.thread

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_elsewhere():
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                "visual_retracing: wanted inference, got a forward that records gradients; use torch.no_grad() or generate"
            )
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError(
                "input_ids: wanted them under visual_retracing, got None; they say where a sample's image is"
            )
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is None or int(cache.get_seq_length()) == 0:
            self.memory = None  # a new prompt
        self.image_tokens = ids == module.config.image_token_id
        same = isinstance(mask, Tensor) and mask.shape == ids.shape
        self.tokens = mask.bool() if same else None  # type: ignore[union-attr]

    def _before_layers(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_elsewhere():
            return
        embeddings, where = kwargs["inputs_embeds"], self.image_tokens
        if where is not None and bool(where.any()):
            self.memory = _memory(embeddings, where)
        self.pending = None
        self.unsettled = None if self.memory is None else self.memory[1] > 0

    def _after_layer(self, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        if self._is_elsewhere() or self.unsettled is None:
            return
        model: Any = self.model()
        last = output[:, -1]
        if self.tokens is not None:
            steps = torch.arange(output.shape[1], device=output.device)
            last = output[torch.arange(len(output), device=output.device), (self.tokens * steps).argmax(1)]
        entropy = next_token_entropy(model.lm_head(model.model.language_model.norm(last)))
        pending = self.unsettled & (entropy > self.threshold).to(self.unsettled.device)
        rest = self.unsettled & ~pending
        any_pending, any_rest = torch.stack([pending.any(), rest.any()]).tolist()
        self.pending = pending if any_pending else None
        self.unsettled = rest if any_rest else None

    def _after_ffn(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._is_elsewhere() or self.pending is None:
            return None
        pending, self.pending = self.pending, None
        assert self.memory is not None
        value, lengths = (t.to(output.device) for t in self.memory)
        pending, x = pending.to(output.device), args[0]
        # The identity's scale is divided out again: any will do that neither overflows float16 nor vanishes in it.
        scale = self._scale(module).to(value.dtype) if self.phi == "silu" else x.shape[-1] ** -0.5
        rows = torch.arange(len(x), device=x.device, dtype=torch.int32)
        found = fused_ffn(
            x, None, None, (value * scale).to(x.dtype), value.to(x.dtype), visual_activation=self.phi, visual_lengths=lengths,
            visual_index=torch.where(pending, rows, -1),
        )  # fmt: skip
        tokens = None if self.tokens is None else self.tokens.to(x.device)
        own, theirs = _mean(output, tokens), _mean(found, tokens)
        ratio = torch.where(theirs > 0, own / theirs, 0)
        mixed = (1 - self.alpha) * output.to(own.dtype) + self.alpha * ratio * found
        return torch.where(pending[:, None, None] & (theirs > 0), mixed.to(output.dtype), output)

    def _scale(self, ffn: Any) -> Tensor:
        """mean|W_up|, read once."""
        if id(ffn) not in self.scales:
            self.scales[id(ffn)] = ffn.up_proj.weight.abs().mean(dtype=torch.float32)
        return self.scales[id(ffn)]


def _memory(embeddings: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """v / mean|v| and the lengths of every sample, in float32 at least."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    lengths = where.sum(1)
    order = where.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    valid = torch.arange(order.shape[1], device=order.device)[None, :] < lengths[:, None]
    tokens = embeddings.gather(1, order[:, :, None].expand(-1, -1, embeddings.shape[-1])).to(dtype)
    tokens = tokens.masked_fill(~valid[:, :, None], 0)
    mean = tokens.abs().sum((1, 2), keepdim=True) / (lengths.clamp(min=1) * tokens.shape[-1])[:, None, None]
    return torch.where(mean > 0, tokens / mean, 0), lengths.int()


def _mean(output: Tensor, tokens: Tensor | None) -> Tensor:
    """mean|output| of every sample (S, 1, 1), in float32 at least, over the tokens that are no padding."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    if tokens is None:
        return output.abs().mean((1, 2), keepdim=True, dtype=dtype)
    masked = output.abs().to(dtype).masked_fill(~tokens[:, :, None], 0)
    return masked.sum((1, 2), keepdim=True) / (tokens.sum(1).clamp(min=1) * output.shape[-1])[:, None, None]
