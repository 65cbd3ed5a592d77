"""What each GPU holds and sends when MemVP trains or decodes over several: the counts in docs/distributed.md.

Bytes are those of whole tensors, before an algorithm splits them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
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


#: ddp    the frozen base on every GPU, the adapter under DistributedDataParallel
#: fsdp2  the base sharded by fully_shard, layer by layer, the adapter under DistributedDataParallel
#: tp     the base split over the GPUs of a node, each node (or part of one) a replica, the memory's slots split with it
MODES = ("ddp", "fsdp2", "tp")

_GPUS_PER_NODE = 8
_FLOAT32 = 4
_ADAM_STATES = 4  # float32 numbers per trained parameter: itself, its gradient, two moments

#: bitsandbytes nf4: half a byte per weight and one float32 scale per block of 64, before double quantization.
_NF4_BYTES = 0.5 + _FLOAT32 / 64


@dataclass(frozen=True)
class Layout:
    """How the GPUs are used.

    Attributes:
        mode: one of MODES.
        gpus: all of them.
    """

    mode: str
    gpus: int

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: wanted one of {', '.join(MODES)}, got {self.mode!r}")

    @property
    def tensor(self) -> int:
        """GPUs that share the work on the same tokens."""
        return min(self.gpus, _GPUS_PER_NODE) if self.mode == "tp" else 1

    @property
    def data(self) -> int:
        """Groups of GPUs that each see their own part of the batch."""
        return self.gpus // self.tensor


@dataclass(frozen=True)
class Collective:
    """One kind of message.

    Attributes:
        name: what for.
        kind: "all-reduce" or "all-gather".
        payload: bytes of the whole tensor (reduced, or after the gathering).
        group: GPUs that take part.
        times: per step.
    """

    name: str
    kind: str
    payload: int
    group: int
    times: int


def layer_parameters(preset: Preset) -> int:
    """Matrices of one decoder layer: q, k, v, o, gate, up, down."""
    d = preset.width
    return 2 * d * d + 2 * d * preset.kv_width + 3 * d * preset.pairs


def outside_parameters(preset: Preset) -> int:
    """What belongs to no layer: embeddings, head (untied), final norm."""
    return 2 * preset.vocabulary * preset.width + preset.width


def base_parameters(preset: Preset) -> int:
    """All of the frozen language model."""
    return preset.layers * (layer_parameters(preset) + 2 * preset.width) + outside_parameters(preset)


def adapter_parameters(preset: Preset) -> int:
    """What MemVP trains: the projector, and one (p^k, p^v) for all layers."""
    d, inner = preset.width, preset.projector_width
    return preset.vision_width * inner + inner + inner * d + d + 2 * preset.slots * d


def base_bytes(preset: Preset, *, element: int = 2, nf4: bool = False) -> float:
    """The base at rest; nf4 quantizes the layers' matrices and leaves embeddings, head and norms as they are."""
    if not nf4:
        return base_parameters(preset) * element
    matrices = preset.layers * layer_parameters(preset)
    return matrices * _NF4_BYTES + (base_parameters(preset) - matrices) * element


def held(
    preset: Preset, layout: Layout, *, sequences: int, length: int, element: int = 2, nf4: bool = False
) -> dict[str, float]:
    """Bytes that one GPU holds at the widest point of a training step with activation checkpointing.

    Args:
        preset: the model.
        layout: of the GPUs.
        sequences: per GPU (a tensor-parallel group runs those of all its members).
        length: tokens of each.
        element: bytes of a number of the base.
        nf4: the base in 4 bits (ddp only; fsdp2 and tp are counted in `element`).

    Returns:
        "base", "gathered" (layers whole for the moment: the running one and the one fetched ahead, and what is outside the
        layers), "adapter" (with gradient and Adam's moments, float32) and "activations" (one input kept per layer).
    """
    rows = sequences * layout.tensor * length
    base = base_bytes(preset, element=element, nf4=nf4 and layout.mode == "ddp")
    gathered = 0.0
    if layout.mode == "fsdp2" and layout.gpus > 1:
        whole = 2 * (layer_parameters(preset) + 2 * preset.width) + outside_parameters(preset)
        gathered = whole * element
        base /= layout.gpus
    elif layout.mode == "tp":
        # the plan of transformers splits the matrices, the embeddings and the head; the norms are whole on every rank
        split = preset.layers * layer_parameters(preset) + 2 * preset.vocabulary * preset.width
        base = (base_parameters(preset) - split + split / layout.tensor) * element
    return {
        "base": base,
        "gathered": gathered,
        "adapter": float(adapter_parameters(preset) * _ADAM_STATES * _FLOAT32),
        "activations": float(preset.layers * rows * preset.width * element),
    }


def training_collectives(
    preset: Preset, layout: Layout, *, sequences: int, length: int, element: int = 2, visual_tokens: int = 0
) -> Iterator[Collective]:
    """Every message of one training step with activation checkpointing.

    Args:
        preset, layout, element: as in :func:`held`.
        sequences: per GPU.
        length: text tokens of each.
        visual_tokens: of an image in the prompt instead of the memory; they run as tokens. 0: the image is in the memory.
    """
    adapter = adapter_parameters(preset) * _FLOAT32
    if layout.data > 1:
        yield Collective("adapter's gradients", "all-reduce", adapter, layout.data, 1)
    if layout.mode == "fsdp2" and layout.gpus > 1:
        layer = (layer_parameters(preset) + 2 * preset.width) * element
        yield Collective("layer, forward and backward", "all-gather", layer, layout.gpus, 2 * preset.layers)
        yield Collective("embeddings, head", "all-gather", outside_parameters(preset) * element, layout.gpus, 1)
    if layout.tensor > 1:
        yield from _tensor_parallel(preset, layout, sequences * layout.tensor, length, element, visual_tokens)


def _tensor_parallel(
    preset: Preset, layout: Layout, sequences: int, length: int, element: int, visual_tokens: int
) -> Iterator[Collective]:
    """Here `sequences` are those of the whole group."""
    tp, d = layout.tensor, preset.width
    n = sequences * (length + visual_tokens)
    rows = n * d * element
    yield Collective("embeddings", "all-reduce", rows, tp, 1)
    yield Collective("attention's and FFN's output", "all-reduce", rows, tp, 2 * preset.layers)
    # A layer's second forward ends at the last thing that its backward needs, before the FFN's reduce.
    yield Collective("attention's output, recomputed", "all-reduce", rows, tp, preset.layers)
    # Nothing below the first layer's memory trains, so its input has no gradient. transformers reduces the gradient of x once
    # for each of q, k, v; the fused FFN once for gate, up and memory together.
    yield Collective("gradients of q's, k's, v's input", "all-reduce", rows, tp, 3 * (preset.layers - 1))
    yield Collective("gradient of the FFN's input", "all-reduce", rows, tp, preset.layers - 1)
    yield Collective("logits", "all-gather", n * preset.vocabulary * element, tp, 1)
    yield Collective("gradient of the head's input", "all-reduce", rows, tp, 1)
    if not visual_tokens:
        slots = -(-preset.slots // tp) * tp  # a gathering pads the last ranks' parts to the size of the others
        yield Collective("gradient of the cores", "all-gather", sequences * slots * preset.rank * _FLOAT32, tp, 1)
        yield Collective("gradient of p^k, p^v", "all-gather", slots * d * _FLOAT32, tp, 2)
        yield Collective("gradient of the basis", "all-reduce", preset.rank * d * _FLOAT32, tp, 1)


def decode_collectives(preset: Preset, layout: Layout, *, sequences: int, element: int = 2) -> Iterator[Collective]:
    """Every message of one generated token for `sequences` sequences; the memory adds none in any mode."""
    if layout.mode == "fsdp2" and layout.gpus > 1:
        layer = (layer_parameters(preset) + 2 * preset.width) * element
        yield Collective("layer", "all-gather", layer, layout.gpus, preset.layers)
    if layout.tensor > 1:
        rows = sequences * preset.width * element
        yield Collective("embeddings", "all-reduce", rows, layout.tensor, 1)
        yield Collective("attention's and FFN's output", "all-reduce", rows, layout.tensor, 2 * preset.layers)
        yield Collective("logits", "all-gather", sequences * preset.vocabulary * element, layout.tensor, 1)


def repeated_flops(preset: Preset) -> int:
    """FLOPs per token and layer of a training step that the slot split runs on every rank: the basis' products.

    x Wᵀ and u W forward, twice under checkpointing; dy Wᵀ, t W, x Wᵀ again and the two products of dW backward.
    """
    return 18 * preset.width * preset.rank


def image_bytes(preset: Preset, *, visual_tokens: int = 256, element: int = 2, stored: bool = True) -> int:
    """One image in memory, for all layers: its core.

    Args:
        preset: the model.
        visual_tokens: of the image.
        element: bytes of a number.
        stored: as `encode_images` gives it, (M, r) with zero rows and columns; False: its rank times its tokens, no padding.
    """
    if stored:
        return preset.slots * preset.rank * element
    return visual_tokens * (preset.projector_width + 1) * element


def prompt_bytes(preset: Preset, *, visual_tokens: int = 256, element: int = 2) -> int:
    """The same image as tokens of the prompt: keys and values in every layer's cache."""
    return 2 * preset.layers * visual_tokens * preset.kv_width * element
