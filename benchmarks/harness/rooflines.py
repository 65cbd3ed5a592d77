"""The one place that counts: FLOPs and bytes of every form of the FFN with visual memory, and the floor that follows.

FLOPs are those of the matrix products, two per multiply-add. Bytes are the fewest that a form must move: each weight, memory
and input read once, each output written once, and what the backward needs written once; whatever can stay on the chip is free.
No variant runs faster than its floor, max(FLOPs / matmul rate, bytes / bandwidth), on the chip whose roofs were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.presets import Preset

__all__ = [
    "FORMS",
    "Count",
    "FFNShape",
    "Roofs",
    "attention",
    "ffn_backward",
    "ffn_forward",
    "head",
    "kernel",
    "layer",
    "training_step",
]

#: How an FFN can take an image in:
#:   text          not at all
#:   prompt        as tokens in front of the text, which run through the same FFN
#:   official      K = f + p^k and V = f + p^v formed anew in every call, as the paper's code does
#:   formed        K and V formed beforehand
#:   positions     f and the positions read and added in the kernel
#:   factored      a core per image; basis and positions shared by the batch
#:   concatenated  K and V appended to the FFN's own weights, once per sequence
FORMS = ("text", "prompt", "official", "formed", "positions", "factored", "concatenated")


@dataclass(frozen=True)
class Count:
    """Work of one call.

    Attributes:
        flops: of the matrix products.
        bytes: the fewest that must pass through device memory.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Count:
        return Count(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Roofs:
    """The chip's ceilings, measured in the same run.

    Attributes:
        matmul_tflops: of a large matrix product, TFLOP/s.
        copy_gbs: device-to-device copy, bytes read plus written, GB/s.
        stream_gbs: a read-only stream, GB/s.
    """

    matmul_tflops: float
    copy_gbs: float
    stream_gbs: float

    def floor_ms(self, count: Count) -> float:
        """Milliseconds under which `count` cannot be done: the larger of its arithmetic's and its traffic's time."""
        bandwidth = max(self.copy_gbs, self.stream_gbs)
        return max(count.flops / self.matmul_tflops / 1e9, count.bytes / bandwidth / 1e6)


@dataclass(frozen=True)
class FFNShape:
    """One FFN call.

    Attributes:
        sequences, tokens: S and T; N = S·T rows of text.
        width, pairs, slots, rank: d, F, M, r.
        images: R, distinct memories; every sequence reads one.
        visual_tokens: tokens of an image in the prompt form.
        element: bytes of one number.
        gated: gate and key, or key alone.
    """

    sequences: int
    tokens: int
    width: int
    pairs: int
    slots: int
    rank: int
    images: int
    visual_tokens: int
    element: int
    gated: bool = True

    @classmethod
    def of(
        cls, preset: Preset, *, sequences: int, tokens: int, visual_tokens: int, element: int, images: int | None = None
    ) -> FFNShape:
        """The FFN of a preset; M grows with the image where the preset's slots are too few."""
        return cls(
            sequences=sequences,
            tokens=tokens,
            width=preset.width,
            pairs=preset.pairs,
            slots=max(preset.slots, visual_tokens),
            rank=preset.rank,
            images=sequences if images is None else images,
            visual_tokens=visual_tokens,
            element=element,
        )

    def rows(self, form: str) -> int:
        """N: the rows that run through the FFN."""
        return self.sequences * (self.tokens + (self.visual_tokens if form == "prompt" else 0))

    @property
    def matrices(self) -> int:
        """Weight matrices of the FFN."""
        return 3 if self.gated else 2

    @property
    def kept(self) -> int:
        """Pre-activations that the backward needs, per row, in units of F."""
        return 2 if self.gated else 1


def ffn_forward(form: str, shape: FFNShape, *, training: bool = False) -> Count:
    """The forward of one FFN.

    Args:
        form: one of FORMS.
        shape: of the call.
        training: the pre-activations and the memory's scores are written for the backward.
    """
    _check(form)
    n, d, f, m = shape.rows(form), shape.width, shape.pairs, shape.slots
    flops = 2 * shape.matrices * n * d * f
    numbers = shape.matrices * d * f + 2 * n * d  # weights; x in, y out
    if form not in ("text", "prompt"):
        flops += _memory_flops(form, shape)
        numbers += _memory_numbers(form, shape)
        if form == "concatenated":  # per-sequence key and value instead of the shared ones
            numbers += 2 * (shape.sequences - 1) * d * f + 2 * shape.sequences * m * d - 2 * shape.images * m * d
    if training:
        numbers += n * shape.kept * f + (n * m if form not in ("text", "prompt") else 0)
        if form == "concatenated":  # the memory changes with every step: the copies are written before they are read
            numbers += 2 * shape.sequences * (f + m) * d
    return Count(flops, numbers * shape.element)


def ffn_backward(form: str, shape: FFNShape) -> Count:
    """The backward of one FFN with frozen weights: the gradients of x and of the memory (for the factored form: of its parts)."""
    _check(form)
    n, d, f, m, r = shape.rows(form), shape.width, shape.pairs, shape.slots, shape.rank
    flops = 2 * shape.matrices * n * d * f
    numbers = shape.matrices * d * f + 2 * n * d + n * shape.kept * f  # weights; dy in, dx out; what was kept
    if form in ("text", "prompt"):
        return Count(flops, numbers * shape.element)
    numbers += n * m + n * d + _memory_numbers(form, shape)  # scores kept; x read again for the memory's gradients
    if form == "factored":
        # e = dy [W; p^v]^T and dx += t W + dS p^k; c_w = x W^T again; dW = t^T x + u^T dy; dp^k = dS^T x; dp^v = visual^T dy
        flops += 2 * n * d * (r + m) * 2 + 2 * n * d * r + 4 * n * d * r + 4 * n * d * m
        # dvisual = e_p + e_w A^T; t = dS A; u = visual A again for dW; dA_k = dS^T c_w; dA_v = visual^T e_w
        flops += 5 * 2 * n * m * r
        numbers += shape.images * m * r + r * d + 2 * m * d
    else:
        flops += 8 * n * m * d  # dvisual, its part of dx, dKv, dVv
        written = 2 * shape.images * m * d
        if form == "concatenated":
            numbers += 2 * (shape.sequences - 1) * d * f + 2 * (shape.sequences - shape.images) * m * d
            written = 2 * shape.sequences * m * d
        if form in ("official", "positions"):
            written = shape.images * m * d + 2 * m * d
        numbers += written
    return Count(flops, numbers * shape.element)


def kernel(name: str, shape: FFNShape) -> Count:
    """One of the five launches that make up a gated FFN with formed memory, forward and backward, when training, or of the two
    that a factored one has besides.

    Args:
        name: "hidden", "output", "dhidden", "dinput" or "dmemory"; "core" or "dcore".
        shape: of the FFN.
    """
    n, d, f, m, r = shape.rows("formed"), shape.width, shape.pairs, shape.slots, shape.rank
    memory, p = shape.images * m * d, shape.kept
    flops, numbers = {
        # x against gate, key and Kv; hidden, visual, pre-activations and scores written
        "hidden": (2 * p * n * d * f + 2 * n * m * d, n * d + p * d * f + memory + n * f + n * m + n * (p * f + m)),
        # hidden and visual against value and Vv
        "output": (2 * n * d * f + 2 * n * m * d, n * f + n * m + d * f + memory + n * d),
        # dy against value and Vv; the pre-activations and scores read, their gradients and visual written
        "dhidden": (2 * n * d * f + 2 * n * m * d, n * d + d * f + memory + n * (p * f + m) + n * (p * f + 2 * m)),
        # those gradients against gate, key and Kv
        "dinput": (2 * p * n * d * f + 2 * n * m * d, n * (p * f + m) + p * d * f + memory + n * d),
        # dKv = dS^T x, dVv = visual^T dy
        "dmemory": (4 * n * m * d, 2 * n * m + 2 * n * d + 2 * memory),
        # c against A, visual against A; [u | visual] and the scores written
        "core": (4 * n * m * r, shape.images * m * r + 2 * n * (r + m) + n * m),
        # e against A, dS and visual against A; the scores read, [t | dS] and [u | visual] written
        "dcore": (6 * n * m * r, shape.images * m * r + 3 * n * (r + m) + n * m),
    }[name]
    return Count(flops, numbers * shape.element)


def attention(preset: Preset, *, sequences: int, queries: int, cached: int, element: int) -> Count:
    """Attention of one decoder layer, projections included, causal among the queries.

    Args:
        preset: widths and heads.
        sequences: S.
        queries: tokens per sequence that run now.
        cached: tokens per sequence whose keys and values are read from the cache.
        element: bytes of one number.
    """
    d, kv = preset.width, preset.kv_width
    n = sequences * queries
    pairs = sequences * (queries * cached + queries * (queries + 1) // 2)
    flops = 2 * n * d * (2 * d + 2 * kv) + 4 * pairs * d
    numbers = 2 * d * d + 2 * d * kv + 2 * n * d
    numbers += 2 * sequences * kv * (cached + queries)  # the cache read, the new entries written
    return Count(flops, numbers * element)


def head(preset: Preset, *, rows: int, element: int) -> Count:
    """The output head over the vocabulary."""
    return Count(
        2 * rows * preset.width * preset.vocabulary,
        (preset.width * preset.vocabulary + rows * (preset.width + preset.vocabulary)) * element,
    )


def layer(form: str, preset: Preset, shape: FFNShape, *, cached: int = 0) -> Count:
    """The forward of one decoder layer.

    Args:
        form: one of FORMS.
        preset: of the model.
        shape: of its FFN; under "prompt" the visual tokens run too, unless `cached` says that they did before.
        cached: tokens per sequence in the cache (decode).
    """
    if cached:  # decode: an image in the prompt is in the cache, and its tokens run no more
        ffn = ffn_forward("text" if form == "prompt" else form, shape)
        queries = shape.tokens
    else:
        ffn = ffn_forward(form, shape)
        queries = shape.rows(form) // max(1, shape.sequences)
    return ffn + attention(preset, sequences=shape.sequences, queries=queries, cached=cached, element=shape.element)


def training_step(form: str, preset: Preset, shape: FFNShape, *, layers: int, checkpointing: bool = False) -> Count:
    """Forward and backward of a frozen stack of decoder layers under a head over the text's tokens.

    Args:
        form: one of FORMS.
        preset: of the model.
        shape: of its FFN.
        layers: decoder layers.
        checkpointing: every layer's forward runs twice.
    """
    queries = shape.rows(form) // max(1, shape.sequences)
    attend = attention(preset, sequences=shape.sequences, queries=queries, cached=0, element=shape.element)
    forward = ffn_forward(form, shape, training=True) + attend
    # Frozen projections: one product each for dx. Scores and values: two products forward, four backward.
    scores = 4 * shape.sequences * (queries * (queries + 1) // 2) * preset.width
    backward = ffn_backward(form, shape) + attend + Count(scores, 0)
    logits = head(preset, rows=shape.sequences * shape.tokens, element=shape.element)
    return (forward * (2 if checkpointing else 1) + backward) * layers + logits * 2


def _memory_flops(form: str, shape: FFNShape) -> int:
    n, d, m, r = shape.rows(form), shape.width, shape.slots, shape.rank
    if form == "factored":  # x [W; p^k]^T, then S and u at the core, then [u | visual] [W; p^v]
        return 4 * n * d * (r + m) + 4 * n * m * r
    return 4 * n * m * d


def _memory_numbers(form: str, shape: FFNShape) -> int:
    """Numbers read of the memory (and, where a form writes and reads it again, that)."""
    memory = shape.images * shape.slots * shape.width
    positions = 2 * shape.slots * shape.width
    if form == "factored":
        return shape.images * shape.slots * shape.rank + shape.rank * shape.width + positions
    if form == "official":  # f and positions read, K and V written and read
        return memory + positions + 4 * memory
    if form == "positions":
        return memory + positions
    return 2 * memory


def _check(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form: wanted one of {', '.join(FORMS)}, got {form!r}")
