"""Which image each request of a step has, under both of vLLM's model runners."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from memvp_kernels.serving.vllm.compat import first_metadata
from memvp_kernels.serving.vllm.memory import EngineMemory

__all__ = ["BoundByBlock", "RequestState"]


class RequestState(DefaultModelState):
    """Runner V2 asks the model for this class, and tells it of every request and every step.

    A prefix-cache hit comes without its image, so cores are kept by the image's identifier. As many as there are KV blocks are
    enough: a cached prefix of an image has a first block of its own, and both caches drop what was used longest ago.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._memory: EngineMemory = model.engine_memory
        # The row of each request slot, on the device: a step's rows are looked up there.
        self._rows = torch.full((self.max_num_reqs,), self._memory.no_image, dtype=torch.int32, device=device)
        self._pending: dict[int, str] = {}
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        features = new_req_data.mm_features
        self._pending.pop(req_index, None)
        self._rows[req_index].fill_(req_index if features else self._memory.no_image)
        if features:
            self._pending[req_index] = features[0].identifier

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Runs after the step's images were encoded, and before its forward."""
        for slot, identifier in self._pending.items():
            self._memory.cores[slot].copy_(self._core(identifier))
        self._pending.clear()
        rows = self._rows[input_batch.idx_mapping[: input_batch.num_reqs].long()]
        self._memory.bind(
            input_batch.query_start_loc[: input_batch.num_reqs + 1],
            rows,
            input_batch.num_tokens,
            input_batch.num_tokens_after_padding,
        )
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        self._memory.unbind(num_tokens)
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs

    def _core(self, identifier: str) -> Tensor:
        encoded = self.encoder_cache.encoder_outputs.get(identifier)
        if encoded is not None:
            self._kept[identifier] = encoded.view(self._memory.cores.shape[1:])
        if identifier not in self._kept:
            raise RuntimeError(
                f"the image {identifier} of a request was neither encoded in this step nor kept from an earlier one"
            )
        self._kept.move_to_end(identifier)
        while len(self._kept) > max(self.vllm_config.cache_config.num_gpu_blocks or 0, self.max_num_reqs):
            self._kept.popitem(last=False)
        return self._kept[identifier]


class BoundByBlock:
    """Runner V1 tells a model nothing of requests: one is known by its first KV block.

    That block's hash holds the image's, so requests that share it have the same image; a request that begins at position 0 begins the
    block anew. Reading tables on the host costs a GPU a synchronisation, which runner V2 does not have.

    Args:
        memory: of the engine.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._by_block: dict[int, Tensor] = {}
        self._new: dict[int, Tensor] = {}

    def encoded(self, is_multimodal: Tensor, cores: list[Tensor]) -> None:
        """Images that begin in the next forward.

        Args:
            is_multimodal: (N,) bool, the rows at which they stand.
            cores: one (1, M · r) each.
        """
        shape = self._memory.cores.shape[1:]
        at = is_multimodal.nonzero()[:, 0].tolist()
        self._new = {row: core.view(shape) for row, core in zip(at, cores, strict=True)}

    def bind(self, positions: Tensor, metadata: Any) -> None:
        """Bind the next forward's rows.

        Args:
            positions: (N,), of the tokens in their requests.
            metadata: the forward context's, by layer; empty while vLLM profiles.
        """
        new, self._new = self._new, {}
        attention, padded = first_metadata(metadata), positions.shape[0]
        if attention is None:
            self._memory.unbind(padded)
            return
        offsets = attention.query_start_loc.tolist()
        blocks = attention.block_table[: len(offsets) - 1, 0].tolist()
        starts = positions[[min(row, padded - 1) for row in offsets[:-1]]].tolist()
        rows = []
        for request, (begin, end, block, start) in enumerate(zip(offsets, offsets[1:], blocks, starts, strict=False)):
            if end > begin and start == 0:
                self._by_block.pop(block, None)
            if end > begin and begin in new:
                self._by_block[block] = new[begin]
            core = self._by_block.get(block) if end > begin else None
            rows.append(self._memory.no_image if core is None else request)
            if core is not None:
                self._memory.cores[request].copy_(core)
        device = self._memory.cu_seqlens.device
        self._memory.bind(
            torch.tensor(offsets, dtype=torch.int32, device=device),
            torch.tensor(rows, dtype=torch.int32, device=device),
            offsets[-1],
            padded,
        )
