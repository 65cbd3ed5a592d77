"""FLOPs and bytes of every form of the FFN with visual memory, and the roofline bound that follows from the chip's peaks.

FLOPs are those of the matrix products, two per multiply-add. Bytes are the fewest that a form must move: each operand read once,
each result written once; whatever can stay on the chip is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from workload import Preset

#: How an FFN can take an image in:
#:   text          not at all
#:   prompt        as tokens in front of the text, which run through the same FFN
#:   official      K = f + p^k and V = f + p^v materialized in every call, as the paper's code does
#:   plain         K and V materialized beforehand
#:   positions     f and the positions read and added in the kernel
#:   factored      a core per image; basis and positions shared by the batch
#:   concatenated  K and V appended to the FFN's own weights, once per sequence
FORMS = ("text", "prompt", "official", "plain", "positions", "factored", "concatenated")
_NO_MEMORY = ("text", "prompt")


@dataclass(frozen=True)
class Count:
    """FLOPs of the matrix products of one call, and the fewest bytes that must pass through device memory."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Count:
        return Count(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Peaks:
    """The chip's measured peaks: a large matrix product, a copy (bytes read plus written), a read-only stream."""

    matmul_tflops: float
    copy_gbs: float
    stream_gbs: float

    def bound_ms(self, count: Count) -> float:
        """The roofline bound: the larger of the arithmetic's and the traffic's time."""
        bandwidth = max(self.copy_gbs, self.stream_gbs)
        return max(count.flops / self.matmul_tflops / 1e9, count.bytes / bandwidth / 1e6)


@dataclass(frozen=True)
class FFNShape:
    """One FFN call.

    Attributes:
        sequences, tokens: S and T; N = S·T rows of text, each sequence with its own image.
        width, pairs, slots, rank: d, F, M, r.
        visual_tokens: tokens of an image in the prompt form.
        element: bytes of one number.
    """

    sequences: int
    tokens: int
    width: int
    pairs: int
    slots: int
    rank: int
    visual_tokens: int
    element: int

    @classmethod
    def of(cls, preset: Preset, *, sequences: int, tokens: int, visual_tokens: int, element: int) -> FFNShape:
        """The FFN of a preset; M grows with the image where the preset's slots are too few."""
        slots = max(preset.slots, visual_tokens)
        return cls(sequences, tokens, preset.width, preset.pairs, slots, preset.rank, visual_tokens, element)

    def rows(self, form: str) -> int:
        """N: the rows that run through the FFN."""
        return self.sequences * (self.tokens + (self.visual_tokens if form == "prompt" else 0))


def ffn_forward(form: str, shape: FFNShape, *, training: bool = False) -> Count:
    """The forward of one gated FFN; in training the pre-activations and the memory's scores are written for the backward."""
    if form not in FORMS:
        raise ValueError(f"form: wanted one of {', '.join(FORMS)}, got {form!r}")
    s, n, d, f, m, r = shape.sequences, shape.rows(form), shape.width, shape.pairs, shape.slots, shape.rank
    flops = 6 * n * d * f
    numbers = 3 * d * f + 2 * n * d  # weights; x in, y out
    if form == "factored":  # x [W; p^k]^T, then S and u at the core, then [u | visual] [W; p^v]
        flops += 4 * n * d * (r + m) + 4 * n * m * r
    elif form not in _NO_MEMORY:
        flops += 4 * n * m * d
    numbers += _memory_numbers(form, shape)
    if form == "concatenated":  # per-sequence key and value instead of the shared ones
        numbers += 2 * (s - 1) * d * f
    if training:
        numbers += 2 * n * f + (0 if form in _NO_MEMORY else n * m)
        if form == "concatenated":  # the memory changes with every step: the copies are written before they are read
            numbers += 2 * s * (f + m) * d
    return Count(flops, numbers * shape.element)


def ffn_backward(form: str, shape: FFNShape) -> Count:
    """The backward of one FFN with frozen weights: the gradients of x and of the memory (for the factored form: of its factors)."""
    s, n, d, f, m, r = shape.sequences, shape.rows(form), shape.width, shape.pairs, shape.slots, shape.rank
    flops = 6 * n * d * f
    numbers = 3 * d * f + 2 * n * d + 2 * n * f  # weights; dy in, dx out; the pre-activations
    if form in _NO_MEMORY:
        return Count(flops, numbers * shape.element)
    numbers += n * m + n * d + _memory_numbers(form, shape)  # scores; x read again for the memory's gradients
    if form == "factored":
        # e = dy [W; p^v]^T and dx += t W + dS p^k; c_w = x W^T again; dW = t^T x + u^T dy; dp^k = dS^T x; dp^v = visual^T dy
        flops += 2 * n * d * (r + m) * 2 + 2 * n * d * r + 4 * n * d * r + 4 * n * d * m
        # dvisual = e_p + e_w A^T; t = dS A; u = visual A again for dW; dA_k = dS^T c_w; dA_v = visual^T e_w
        flops += 5 * 2 * n * m * r
        numbers += s * m * r + r * d + 2 * m * d
    else:
        flops += 8 * n * m * d  # dvisual, its share of dx, dKv, dVv
        numbers += s * m * d + 2 * m * d if form in ("official", "positions") else 2 * s * m * d
        if form == "concatenated":
            numbers += 2 * (s - 1) * d * f
    return Count(flops, numbers * shape.element)


def _memory_numbers(form: str, shape: FFNShape) -> int:
    """Numbers read of the memory (and, where a form writes and reads it again, that)."""
    if form in _NO_MEMORY:
        return 0
    memory, positions = shape.sequences * shape.slots * shape.width, 2 * shape.slots * shape.width
    if form == "factored":
        return shape.sequences * shape.slots * shape.rank + shape.rank * shape.width + positions
    if form == "official":  # f and positions read, K and V written and read
        return memory + positions + 4 * memory
    return memory + positions if form == "positions" else 2 * memory


def kernel(name: str, shape: FFNShape) -> Count:
    """One kernel of a gated FFN in training: "hidden", "output", "dhidden", "dinput", "dmemory" of a plain memory, "core" and
    "dcore" of a factored one."""
    s, n, d, f, m, r = shape.sequences, shape.rows("plain"), shape.width, shape.pairs, shape.slots, shape.rank
    memory = s * m * d
    flops, numbers = {
        # x against gate, key and Kv; hidden, visual, pre-activations and scores written
        "hidden": (4 * n * d * f + 2 * n * m * d, n * d + 2 * d * f + memory + n * f + n * m + n * (2 * f + m)),
        # hidden and visual against value and Vv
        "output": (2 * n * d * f + 2 * n * m * d, n * f + n * m + d * f + memory + n * d),
        # dy against value and Vv; the pre-activations and scores read, their gradients and visual written
        "dhidden": (2 * n * d * f + 2 * n * m * d, n * d + d * f + memory + n * (2 * f + m) + n * (2 * f + 2 * m)),
        # those gradients against gate, key and Kv
        "dinput": (4 * n * d * f + 2 * n * m * d, n * (2 * f + m) + 2 * d * f + memory + n * d),
        # dKv = dS^T x, dVv = visual^T dy
        "dmemory": (4 * n * m * d, 2 * n * m + 2 * n * d + 2 * memory),
        # c against A, visual against A; [u | visual] and the scores written
        "core": (4 * n * m * r, s * m * r + 2 * n * (r + m) + n * m),
        # e against A, dS and visual against A; the scores read, [t | dS] and [u | visual] written
        "dcore": (6 * n * m * r, s * m * r + 3 * n * (r + m) + n * m),
    }[name]
    return Count(flops, numbers * shape.element)


def attention(preset: Preset, *, sequences: int, queries: int, cached: int, element: int) -> Count:
    """Attention of one decoder layer, projections included, causal among `queries` new tokens after `cached` ones."""
    d, kv = preset.width, preset.kv_width
    n = sequences * queries
    pairs = sequences * (queries * cached + queries * (queries + 1) // 2)
    flops = 2 * n * d * (2 * d + 2 * kv) + 4 * pairs * d
    numbers = 2 * d * d + 2 * d * kv + 2 * n * d
    numbers += 2 * sequences * kv * (cached + queries)  # the cache read, the new entries written
    return Count(flops, numbers * element)


def head(preset: Preset, *, rows: int, element: int) -> Count:
    """The output head over the vocabulary."""
    d, v = preset.width, preset.vocabulary
    return Count(2 * rows * d * v, (d * v + rows * (d + v)) * element)


def layer(form: str, preset: Preset, shape: FFNShape, *, cached: int = 0) -> Count:
    """The forward of one decoder layer; with tokens in the cache the visual tokens of a prompt run no more."""
    ffn = ffn_forward("text" if cached and form == "prompt" else form, shape)
    queries = shape.tokens if cached else shape.rows(form) // shape.sequences
    return ffn + attention(preset, sequences=shape.sequences, queries=queries, cached=cached, element=shape.element)


def training_step(form: str, preset: Preset, shape: FFNShape, *, layers: int, checkpointing: bool = False) -> Count:
    """Forward and backward of a frozen stack of decoder layers under a head over the text's tokens."""
    queries = shape.rows(form) // shape.sequences
    attend = attention(preset, sequences=shape.sequences, queries=queries, cached=0, element=shape.element)
    forward = ffn_forward(form, shape, training=True) + attend
    # Frozen projections: one product each for dx. Scores and values: two products forward, four backward.
    scores = 4 * shape.sequences * (queries * (queries + 1) // 2) * preset.width
    backward = ffn_backward(form, shape) + attend + Count(scores, 0)
    logits = head(preset, rows=shape.sequences * shape.tokens, element=shape.element)
    return (forward * (2 if checkpointing else 1) + backward) * layers + logits * 2
