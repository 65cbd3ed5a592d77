"""A LLaMA small enough for CPU processes, with an adapter whose every gradient is alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from memvp_kernels.models import MemVPConfig, MemVPModel
from tests.models.tiny import shuffled

CONFIG = MemVPConfig(vision_dim=16, projector_dim=7, num_slots=6, dropout=0.0, feature_scale=1.0, memory_scale=0.5)
ADEM_VL = MemVPConfig.adem_vl(
    vision_dim=16,
    projector_dim=7,
    pooled_grids=(4, 1),
    feature_scale=1.0,
    memory_scale=0.5,
    visual_drop=0.3,
    text_prefix=(5,),
)


def shape(**changes: Any) -> Any:
    """The language model's configuration."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
    }
    return LlamaConfig(**{**sizes, **changes})


def language_model(**changes: Any) -> Any:
    """The same weights at every call."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(shape(**changes)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero
                torch.nn.init.normal_(parameter, std=0.3)
        return model


def memvp_model(base: Any = None, config: MemVPConfig = CONFIG, **options: Any) -> MemVPModel:
    """An adapter that is not at its start, where half of the gradients are zero."""
    model = MemVPModel(language_model() if base is None else base, config, **options)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(12)
        for parameter in model.memory.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float32))
    return model.train()


def batch(samples: int = 4, length: int = 5, tokens: int = 4, *, without: tuple[int, ...] = ()) -> dict[str, Any]:
    """`samples` questions, each with an image of `tokens` features but for those in `without`."""
    generator = torch.Generator().manual_seed(13)
    ids = torch.randint(0, 64, (samples, length), generator=generator)
    features: list[Tensor | None] = list(torch.randn(samples, tokens, CONFIG.vision_dim, generator=generator))
    for i in without:
        features[i] = None
    return {"input_ids": ids, "labels": ids.clone(), "image_features": features}


def saved_base(folder: Any, **changes: Any) -> str:
    """The language model's weights on disk, for ranks that load their part."""
    language_model(**changes).save_pretrained(folder)
    return str(folder)


def split_base(folder: str, **how: Any) -> Any:
    """The saved language model, split over all ranks as it is loaded, or (`how`) as transformers is told otherwise."""
    from transformers import LlamaForCausalLM

    if not how:
        from transformers.distributed import DistributedConfig

        how = {"distributed_config": DistributedConfig(tp_size=torch.distributed.get_world_size())}
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", **how)


def adapter_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the memory's parameters by name, whatever wraps it."""
    memory = getattr(model.memory, "module", model.memory)
    return {name: p.grad.detach().clone() for name, p in memory.named_parameters() if p.grad is not None}


class Reference(NamedTuple):
    """What one process computes from a whole batch, and how far float32 alone may be from it.

    Attributes:
        loss: in float64 (but for the norms, which transformers computes in float32).
        gradients: of the memory's parameters, likewise.
        limit: twice the worst relative error of the same in float32 (or another dtype), the bound for any other order of sums.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    limit: float

    def errors(self, loss: Tensor, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Relative error of each, over the limit: 1.0 is the most that may be."""
        assert set(gradients) == set(self.gradients), set(gradients) ^ set(self.gradients)
        found = {name: difference(gradients[name], wanted) for name, wanted in self.gradients.items()}
        return {name: error / self.limit for name, error in {"loss": difference(loss, self.loss), **found}.items()}


def reference(
    inputs: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    config: MemVPConfig = CONFIG,
    base: Callable[[], Any] = language_model,
    seed: int = 0,
) -> Reference:
    """One process, the whole batch; the limit for a language model in ``dtype``, and ``seed`` before each run for dropout.

    How large its error is depends on the order of its sums: the limit takes the worst of four orders of the FFNs' pairs, over
    the memory's factors and over Kv and Vv.
    """
    wide = _trained(memvp_model(base().to(torch.float64), config), inputs, seed)
    exact, runs = Reference(*wide, limit=1.0), []
    for materialize in (False, True):
        with mock.patch("memvp_kernels.models.inputs.materializing_pays", return_value=materialize):
            models = (memvp_model(shuffled(base(), order).to(dtype), config) for order in range(4))
            runs += [_trained(model, inputs, seed) for model in models]
    return exact._replace(limit=2 * max(error for run in runs for error in exact.errors(*run).values()))


def _trained(model: MemVPModel, inputs: dict[str, Any], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), adapter_gradients(model)


def difference(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; two zeros do not differ."""
    found, wanted = found.detach().double(), wanted.detach().double()
    size = wanted.norm().item()
    return (found - wanted).norm().item() / size if size else found.norm().item()
