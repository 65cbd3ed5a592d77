"""The images of an engine's requests as the FFNs read them: cores in one buffer, and which token reads which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

from memvp_kernels.models.io import adapter
from memvp_kernels.models.memory import vision_tower
from memvp_kernels.models.memory.visual_memory import VisualMemory
from memvp_kernels.models.patching.vision_adapters import VisionTower
from memvp_kernels.serving.vllm.folder import ServedFolder
from memvp_kernels.shared_memory import SharedMemory, fused_ffn_shared

__all__ = ["EngineMemory", "ImageEncoder"]


class ImageEncoder:
    """Images to cores, as MemVPModel makes them: the vision model, the projector, the learned positions.

    Args:
        folder: what is served.
        width: d of the language model.
        layers: how many of its layers have memory.
        dtype: of the language model.
        device: of everything here.
    """

    def __init__(
        self, folder: ServedFolder, *, width: int, layers: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        config, state, settings = adapter.load(folder.adapter)
        self._dtype = dtype
        self._memory = VisualMemory(config, width=width, layers=layers, dtype=torch.float32, device=device).eval()
        vision: VisionTower | None = None
        if folder.vision is not None:
            clip: nn.Module = CLIPVisionModel.from_pretrained(folder.vision, dtype=dtype)
            vision = VisionTower(clip.to(device))
            vision.freeze()
        else:  # ready features alone: what was trained inside a vision model has no place here
            state = {name: tensor for name, tensor in state.items() if not name.startswith("vision_model.")}
        adapter.load_into(adapter.Adapter(self._memory, vision), state, settings)
        self._vision = None if vision is None else vision.module.eval()
        with torch.no_grad():
            empty = torch.zeros(1, config.num_slots, folder.rank, device=device)
            self.memory = self._memory(core=empty).to(dtype)
        # They are in the memory now; a pair for each layer in float32 would take hundreds of megabytes from the KV cache.
        del self._memory.key_position, self._memory.value_position

    @torch.inference_mode()
    def encode(
        self,
        pixel_values: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        visual_core: Tensor | Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Cores (M, r) in the language model's dtype, one per image.

        Args:
            pixel_values: (B, 3, H, W).
            image_features: (B, n, vision_dim), or one tensor (n_i, vision_dim) per image.
            visual_core: (B, M, r), or a list of (M, r).
        """
        parameter = self._memory.projector.fc1.weight
        if visual_core is not None:
            return [core.to(parameter.device, self._dtype) for core in visual_core]
        if pixel_values is not None:
            assert self._vision is not None, "the processor refuses pictures"
            image_features = vision_tower.encode(self._vision, pixel_values)
        assert image_features is not None
        cores = []
        for features in image_features:
            rows = features.to(parameter)[None]
            valid = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
            cores.append(self._memory.encode(rows, valid)[0].to(self._dtype))
        return cores


class EngineMemory:
    """Cores and the sequences of a step, in buffers that never move: what a CUDA graph reads, a later step may change.

    Args:
        encoder: of the images.
        requests: that may run at once.
        device: of the buffers.
    """

    def __init__(self, encoder: ImageEncoder, requests: int, device: torch.device) -> None:
        self.memory = memory = encoder.memory
        parts = (memory.basis, memory.key_position, memory.value_position)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError(f"the adapter has values that are not finite in {memory.basis.dtype}; serve it in float32")
        self.no_image = requests
        """The row of a request without an image: a zero core, so that it keeps the positions, as in MemVPModel."""
        self.cores = memory.core.new_zeros(requests + 1, *memory.core.shape[1:])
        self._shared = SharedMemory(self.cores, *parts, self.cores.dtype, finite=True)
        # One sequence for each request, and the last one for the rows that pad a step: those read no memory.
        self.cu_seqlens = torch.zeros(requests + 2, dtype=torch.int32, device=device)
        self.visual_index = torch.full((requests + 1,), -1, dtype=torch.int32, device=device)

    def bind(self, offsets: Tensor, rows: Tensor, tokens: int, padded: int) -> None:
        """Say who reads what in the next forward, without waiting for the device.

        Args:
            offsets: (S + 1,) int32, where each request's tokens begin and the last one's end.
            rows: (S,) of `cores`.
            tokens: in all requests together.
            padded: rows of the forward's hidden states.
        """
        count = rows.shape[0]
        self.cu_seqlens[: count + 1].copy_(offsets)
        self.cu_seqlens[count + 1 : -1].fill_(tokens)
        self.cu_seqlens[-1:].fill_(padded)
        self.visual_index[:count].copy_(rows)
        self.visual_index[count:].fill_(-1)

    def unbind(self, padded: int) -> None:
        """No row reads memory in the next forward, which vLLM runs to profile or to capture."""
        self.cu_seqlens[:-1].fill_(0)
        self.cu_seqlens[-1:].fill_(padded)
        self.visual_index.fill_(-1)

    def run(
        self,
        x: Tensor,
        weights: Mapping[str, Tensor | None],
        layer: int,
        activation: str,
        residual: Tensor | None = None,
    ) -> Tensor:
        """An FFN with its memory for the bound step.

        Args:
            x: (N, d), the FFN's input.
            weights: key, value, gate and biases, as the operator takes them; none for the memory's part alone.
            layer: its position among the layers that have memory.
            activation: of the FFN and of the visual branch.
            residual: (N, d), what is added, such as the output of an FFN that ran elsewhere.
        """
        return fused_ffn_shared(
            x,
            weights,
            self._shared,
            layer,
            visual_index=self.visual_index,
            cu_seqlens=self.cu_seqlens,
            residual=residual,
            activation=activation,
            visual_scale=self.memory.scale_of(layer),
            dropout_p=0.0,
            recompute=False,
            backend=self.memory.backend,
        )
