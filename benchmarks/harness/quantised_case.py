"""A training step of MemVPModel on a base in its own dtype and on one whose decoder layers are in 4 bits (bitsandbytes, NF4)."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from harness import training_case
from harness.cli import Setting
from harness.measure import Candidate, Truth
from harness.model_case import Model
from harness.operands import Weights
from harness.product import NAME, Product
from harness.stack import Stack
from harness.variants import PLAIN_PYTORCH, variants, yardstick

__all__ = ["candidates"]

_FFN = {"gate": "gate_proj", "key": "up_proj", "value": "down_proj"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def candidates(setting: Setting, model: Model, **case: Any) -> list[Candidate]:
    """MemVPModel on both bases; the one in 4 bits is held against plain PyTorch and float64 on the matrices that those bits restore.

    Args:
        setting: device, dtype, preset.
        model: weights.
        **case: sequences, text_length, visual_tokens, recompute and checkpointing, of training_case.model_candidates.
    """
    step = training_case.ModelStep(setting, model, **case)
    own = next(found for found in training_case.model_candidates(setting, model, **case) if found.name == NAME)

    @functools.cache
    def restored() -> Stack:
        return _restored(model.head, step.product(model.head, prepare=quantise))

    def truth() -> Truth:
        plain, exact = (
            variants(setting.device, compiled=False)[name] for name in (yardstick("factored"), PLAIN_PYTORCH)
        )
        wide = copy.deepcopy(step.adapter).double()
        return Truth(
            step.gradients(plain, restored(), step.adapter, setting.dtype),
            step.gradients(exact, restored().double(), wide, torch.float64),
        )

    return [
        own,
        Candidate(
            name=f"{NAME}-nf4",
            build=functools.partial(step.build_product, quantise),
            truth=truth,
            count=own.count,
            missing="bitsandbytes is not installed" if importlib.util.find_spec("bitsandbytes") is None else None,
            memory_per_image=own.memory_per_image,
            note="decoder layers in NF4, embedding and head not; its floor counts the bytes of the other's weights",
        ),
    ]


def quantise(language_model: nn.Module) -> None:
    """Puts every linear layer of the decoder layers into NF4, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in language_model.model.layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            device, dtype = linear.weight.device, linear.weight.dtype
            small = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, small.to(device))


def _restored(stack: Stack, product: Product) -> Stack:
    """A copy of the stack with the matrices that the product's 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    def matrix(linear: Any) -> Tensor:
        found: Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return found.to(stack.head.weight.dtype)

    twin = stack.twin()
    layers = product.model.language_model.model.layers
    with torch.no_grad():
        for own, theirs in zip(twin.layers, layers, strict=True):
            for name in _ATTENTION:
                getattr(own.self_attn, name).weight.copy_(matrix(getattr(theirs.self_attn, name)))
            found = {field: matrix(getattr(theirs.mlp, name)) for field, name in _FFN.items()}
            own.mlp.weights = Weights(gate=found["gate"], key=found["key"], value=found["value"].T)
    return twin
