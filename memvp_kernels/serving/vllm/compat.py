"""Everything that depends on vLLM's version: the versions that work, and what moved between them."""

from __future__ import annotations

from typing import Any

import vllm

__all__ = ["SUPPORTED", "check_config", "check_version", "first_metadata"]

#: Minor versions; docs/serving.md says which have been run.
SUPPORTED = ("0.30", "0.31", "0.32", "0.33")


def check_version(version: str = vllm.__version__) -> None:
    """Raise RuntimeError for a version of vLLM that this plug-in does not know.

    Args:
        version: such as "0.32.0" or "0.32.1rc1+cpu".
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise RuntimeError(
            f"vllm: wanted a version from {SUPPORTED[0]} to {SUPPORTED[-1]}, got {version}; install one of these, or a "
            "version of memvp_kernels that knows this one"
        )


def check_config(config: Any) -> None:
    """Refuse, at start and by name, what would lose an image.

    Args:
        config: vLLM's VllmConfig.

    Raises:
        ValueError: pipeline or prefill context parallelism, a KV connector, micro-batches, or CUDA graphs of the whole model under runner V1.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise _refused("pipeline parallelism", "the images reach the first stage only; use tensor parallelism")
    if parallel.prefill_context_parallel_size > 1:
        raise _refused("prefill context parallelism", "a rank sees a part of the step's rows; use tensor parallelism")
    if parallel.use_ubatching:
        raise _refused("micro-batches (DBO)", "the rows of a step are bound to images once; switch them off")
    if config.kv_transfer_config is not None:
        raise _refused(
            "a KV connector or KV offload", "a KV cache from elsewhere comes without its image; switch it off"
        )
    if config.use_v2_model_runner:
        return
    model = config.model_config
    window = model.get_sliding_window()
    if window is not None and window < model.max_model_len:
        raise _refused(
            f"model runner V1 with a sliding window of {window} tokens",
            f"a request is known there by its first KV block, which the window gives up; set max_model_len to {window} or "
            "VLLM_USE_V2_MODEL_RUNNER=1",
        )
    if config.compilation_config.cudagraph_mode.has_full_cudagraphs() and config.device_config.device_type == "cuda":
        raise _refused(
            "model runner V1 with CUDA graphs of the whole model",
            "the rows are bound to images in Python; set VLLM_USE_V2_MODEL_RUNNER=1 or cudagraph_mode=PIECEWISE",
        )


def _refused(what: str, way_out: str) -> ValueError:
    return ValueError(f"memvp_kernels does not serve with {what}: {way_out}")


def first_metadata(metadata: Any) -> Any:
    """One layer's attention metadata out of a forward context's, None while vLLM profiles.

    Args:
        metadata: a dict by layer, or a list of those for micro-batches.
    """
    if isinstance(metadata, list):
        metadata = metadata[0]
    return next(iter(metadata.values())) if metadata else None
