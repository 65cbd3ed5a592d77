"""An FFN of vLLM with its memory: computed here as a whole where its matrices can be read, else by vLLM, and the memory is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod

from memvp_kernels.dispatch import missing
from memvp_kernels.serving.vllm.memory import EngineMemory

__all__ = ["OPTION", "give_memory"]

#: Of vLLM's additional_config: "fused" or "vllm", who computes the FFNs.
OPTION = "memvp_ffn"


@torch.library.custom_op("memvp_kernels::vllm_ffn", mutates_args=())
def _ffn(x: Tensor, y: Tensor | None, layer: str) -> Tensor:
    """The FFN is found by its name, as vLLM's attention is, so that a compiled graph holds no tensor of a step and no weight."""
    found: Tensor = get_forward_context().no_compile_layers[layer].memvp(x, y)
    return found


@_ffn.register_fake
def _(x: Tensor, y: Tensor | None, layer: str) -> Tensor:
    return x.new_empty(x.shape)


class _Whole(nn.Module):
    """In front of an FFN's own class, which keeps its parameters' names and its loaders, and does not run."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.memvp_kernels.vllm_ffn(x, None, self._memvp_name)
        return y


class _Added(nn.Module):
    """The same, and its own class runs as it is."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        y = super().forward(x, *arguments, **options)
        added: Tensor = torch.ops.memvp_kernels.vllm_ffn(x, y, self._memvp_name)
        return added


class _KeptAsLoaded(UnquantizedLinearMethod):
    """On a CPU vLLM would pack the matrix for its own product, and drop it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


def give_memory(ffn: Any, memory: EngineMemory, layer: int, activation: str, name: str, config: Any) -> None:
    """Let an FFN of vLLM read the memory.

    Args:
        ffn: before its weights are loaded. Its output is whole on every rank.
        memory: of the engine.
        layer: its position among the layers that have memory.
        activation: of the visual branch.
        name: unique in the model.
        config: vLLM's VllmConfig.

    Raises:
        ValueError: the option has another value, or asks for what this FFN can't have.
    """
    whole = _is_whole(ffn, activation, config, memory.cores.device)
    kind = type(ffn)
    ffn.__class__ = type(kind.__name__, (_Whole if whole else _Added, kind), {"__module__": kind.__module__})
    ffn._memvp_name = name
    if whole:
        ffn.gate_up_proj.quant_method, ffn.down_proj.quant_method = _KeptAsLoaded(), _KeptAsLoaded()
        ffn.memvp = lambda x, _: memory.run(x, _weights(ffn), layer, activation)
    else:
        ffn.memvp = lambda x, y: memory.run(x, {}, layer, activation, residual=y)
    config.compilation_config.static_forward_context[name] = ffn


def _is_whole(ffn: Any, activation: str, config: Any, device: torch.device) -> bool:
    """Whether the operator computes the FFN; unless asked, where its kernels run: on a CPU vLLM's own packed products are faster."""
    options = config.additional_config
    asked = options.get(OPTION) if isinstance(options, dict) else None
    if asked not in (None, "fused", "vllm"):
        raise ValueError(f'additional_config: wanted "{OPTION}" to be "fused" or "vllm", got {asked!r}')
    reason = _opaque(ffn, activation, config)
    if asked is None:
        return reason is None and device.type == "cuda" and missing("triton", device) is None
    if asked == "fused" and reason is not None:
        raise ValueError(
            f'additional_config: "{OPTION}": "fused" wants FFNs whose matrices can be read, but {reason}; leave it out'
        )
    return bool(asked == "fused")


def _opaque(ffn: Any, activation: str, config: Any) -> str | None:
    """Why vLLM has to run an FFN; None where it does not."""
    if config.lora_config is not None:
        return "LoRA is enabled"
    for name, kind in (("gate_up_proj", MergedColumnParallelLinear), ("down_proj", RowParallelLinear)):
        linear = getattr(ffn, name, None)
        method = type(getattr(linear, "quant_method", None))
        if type(linear) is not kind or method is not UnquantizedLinearMethod:
            return f"{name} is a {type(linear).__name__} with {method.__name__}"
    # A rank computes one term of a sum. The memory goes into the sum once: if one rank had it in its term, the others would wait for that rank.
    if ffn.down_proj.tp_size > 1:
        return "tensor parallelism spreads them over ranks"
    if _activation(ffn.act_fn) != activation:
        return f"its activation is not {activation}"
    return None


def _activation(function: nn.Module) -> str | None:
    if isinstance(function, GeluAndMul):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    return "silu" if isinstance(function, SiluAndMul) else None


def _weights(ffn: Any) -> dict[str, Tensor | None]:
    """Views, made at each call: what is behind a parameter may change when vLLM reloads or offloads weights."""
    both, down = ffn.gate_up_proj, ffn.down_proj
    gate, key = both.weight.detach().chunk(2)
    gate_bias, key_bias = (None, None) if both.bias is None else both.bias.detach().chunk(2)
    return {
        "key": key,
        "value": down.weight.detach().T,
        "gate": gate,
        "key_bias": key_bias,
        "gate_bias": gate_bias,
        "value_bias": None if down.bias is None else down.bias.detach(),
    }
