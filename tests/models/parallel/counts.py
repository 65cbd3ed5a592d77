"""What each GPU holds and sends in a training step with activation checkpointing: the formulas of docs/distributed.md.

Bytes are those of whole tensors, before an algorithm splits them up.
"""

from __future__ import annotations

from typing import NamedTuple

_GPUS_PER_NODE = 8
_FLOAT32 = 4
_ADAM_STATES = 4  # float32 numbers per trained parameter: itself, its gradient, two moments
_NF4_BYTES = (
    0.5 + _FLOAT32 / 64
)  # half a byte per weight and a float32 scale per block of 64, before double quantization


class Preset(NamedTuple):
    """The shape of a LLaMA and of its memory: d, F, heads, layers, tokens, M, and the projector's widths."""

    width: int
    pairs: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    slots: int
    vision_width: int
    projector_width: int

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.width // self.heads

    @property
    def rank(self) -> int:
        """r: the projector's inner width and a column of ones, to the next multiple of 8."""
        return (self.projector_width + 1 + 7) // 8 * 8

    @property
    def matrices(self) -> int:
        """Parameters of all layers' q, k, v, o, gate, up and down."""
        d = self.width
        return self.layers * (2 * d * d + 2 * d * self.kv_width + 3 * d * self.pairs)

    @property
    def outside(self) -> int:
        """Parameters in no layer: embeddings, head (untied), final norm."""
        return 2 * self.vocabulary * self.width + self.width

    @property
    def base(self) -> int:
        """Parameters of the frozen language model."""
        return self.matrices + self.layers * 2 * self.width + self.outside

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer with its norms."""
        return self.matrices // self.layers + 2 * self.width

    @property
    def adapter(self) -> int:
        """What MemVP trains: the projector, and one (p^k, p^v) for all layers."""
        d, inner = self.width, self.projector_width
        return self.vision_width * inner + inner + inner * d + d + 2 * self.slots * d

    def image_bytes(self, element: int = 2) -> int:
        """One image in memory, for all layers, as `encode_images` gives it: its core (M, r)."""
        return self.slots * self.rank * element

    def prompt_bytes(self, visual_tokens: int = 256, element: int = 2) -> int:
        """The same image as tokens of the prompt: keys and values in every layer's cache."""
        return 2 * self.layers * visual_tokens * self.kv_width * element

    def nf4_bytes(self, element: int = 2) -> float:
        """The base with its layers' matrices in 4 bits; embeddings, head and norms stay as they are."""
        return self.matrices * _NF4_BYTES + (self.base - self.matrices) * element


class Message(NamedTuple):
    """A collective: what for, its kind, bytes of the whole tensor, GPUs that take part, times per step."""

    what: str
    kind: str
    payload: int
    group: int
    times: int


def held(p: Preset, mode: str, gpus: int, *, rows: int, element: int = 2) -> dict[str, float]:
    """Bytes that one GPU holds at the widest point of a step.

    Args:
        p: the model.
        mode: "ddp" (the base on every GPU), "fsdp2" (sharded layer by layer) or "tp" (split over the GPUs of a node).
        gpus: all of them.
        rows: tokens that one GPU runs.
        element: bytes of a number of the base.

    Returns:
        "base" (with what is whole for the moment), "adapter" (with gradient and Adam's moments), "activations" (one input per layer).
    """
    base = p.base * element
    if mode == "fsdp2":  # the running layer, the one fetched ahead, and what is outside the layers are whole
        base = p.base * element / gpus + (2 * p.layer + p.outside) * element
    elif (
        mode == "tp"
    ):  # transformers' plan splits the matrices, the embeddings and the head; norms are whole on every rank
        split = p.matrices + 2 * p.vocabulary * p.width
        base = (p.base - split + split / min(gpus, _GPUS_PER_NODE)) * element
    adapter = p.adapter * _ADAM_STATES * _FLOAT32
    return {"base": base, "adapter": adapter, "activations": p.layers * rows * p.width * element}


def messages(p: Preset, mode: str, gpus: int, *, sequences: int, length: int, element: int = 2) -> list[Message]:
    """Every message of a step; `sequences` run on one GPU, or with "tp" on all of them together."""
    if mode != "tp":
        adapter = Message("adapter's gradients", "all-reduce", p.adapter * _FLOAT32, gpus, 1)
        return [adapter, *(_sharded(p, gpus, element) if mode == "fsdp2" else [])]
    rows = sequences * length * p.width * element
    slots = -(-p.slots // gpus) * gpus  # a gathering pads the last ranks' parts to the size of the others
    of_rows = {
        "embeddings": 1,
        "attention's and FFN's output": 2 * p.layers,
        # A layer's second forward ends at the last thing that its backward needs, before the FFN's reduce.
        "attention's output, recomputed": p.layers,
        # Nothing below the first layer's memory trains, so its input has no gradient. transformers reduces the gradient of x
        # once for each of q, k, v; the fused FFN once for gate, up and memory together.
        "gradients of q's, k's, v's and the FFN's input": 4 * (p.layers - 1),
        "gradient of the head's input": 1,
    }
    return [
        *(Message(what, "all-reduce", rows, gpus, times) for what, times in of_rows.items()),
        Message("logits", "all-gather", sequences * length * p.vocabulary * element, gpus, 1),
        Message("gradient of the cores", "all-gather", sequences * slots * p.rank * _FLOAT32, gpus, 1),
        Message("gradient of p^k, p^v", "all-gather", slots * p.width * _FLOAT32, gpus, 2),
        Message("gradient of the basis", "all-reduce", p.rank * p.width * _FLOAT32, gpus, 1),
    ]


def _sharded(p: Preset, gpus: int, element: int) -> list[Message]:
    layers = Message("layer, forward and backward", "all-gather", p.layer * element, gpus, 2 * p.layers)
    return [layers, Message("embeddings, head", "all-gather", p.outside * element, gpus, 1)]
