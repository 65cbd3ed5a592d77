"""Tensor parallelism: outputs and gradients of ranks that share the work equal those of one process that does it all."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memvp_kernels import MemVPConfig
from memvp_kernels.autograd import draw_seed
from memvp_kernels.models.parallel import tensor_parallel as parallel
from memvp_kernels.models.patching import feed_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque
from tests.models.parallel.processes import Group
from tests.models.parallel.tiny import (
    ADEM_VL,
    CONFIG,
    adapter_gradients,
    batch,
    language_model,
    memvp_model,
    reference,
    saved_base,
    split_base,
)
from tests.models.tools import fails_before


class Variant(NamedTuple):
    """What differs from the tiny model of the other tests."""

    base: dict[str, Any]
    config: MemVPConfig = CONFIG
    checkpointing: bool = False
    recompute: bool = False
    tokens: int = 4


VARIANTS = {
    "plain": Variant({}),
    "checkpointing": Variant({}, checkpointing=True),
    "recompute": Variant({}, recompute=True),
    "biases": Variant({"mlp_bias": True}),  # down_proj's is added once, after the reduce
    "a pair of positions per layer": Variant({}, replace(CONFIG, shared_positions=False)),
    "ADEM-VL": Variant({}, replace(ADEM_VL, class_token=False, text_prefix=())),
    "one slot": Variant({}, replace(CONFIG, num_slots=1), tokens=1),  # and so ranks without any
    "grouped queries, odd widths": Variant({"num_key_value_heads": 2, "intermediate_size": 57}),
}


def _train_and_generate(folder: str, name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    inputs = batch(tokens=variant.tokens, without=(1,))
    wanted = reference(inputs, config=variant.config, base=lambda: language_model(**variant.base))
    model = memvp_model(split_base(folder), config=variant.config, recompute=variant.recompute)
    if variant.checkpointing:
        model.gradient_checkpointing_enable()
    fused = [isinstance(ffn.ffn_matrices(), Matrices) for _, ffn in model.memory_ffns()]
    out = model(**inputs).loss
    out.backward()
    found = adapter_gradients(model)
    generation = {k: v for k, v in inputs.items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = memvp_model(language_model(**variant.base), variant.config).eval().generate(**generation, **options)
    together = model.eval().generate(**generation, **options)
    return {
        "fused": all(fused),
        "errors": wanted.errors(out, found),
        "tokens": torch.equal(alone, together),
        "bits": torch.cat([g.flatten() for g in found.values()]).numpy().tobytes(),
    }


@pytest.mark.parametrize(
    ("ranks", "variant"),
    [*((2, name) for name in VARIANTS), *((4, name) for name in ("plain", "checkpointing", "one slot"))],
)
def test_a_split_model_trains_and_generates_like_the_whole(
    request: pytest.FixtureRequest, ranks: int, variant: str, tmp_path: Any
) -> None:
    group: Group = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    answers = group.run(_train_and_generate, saved_base(tmp_path, **VARIANTS[variant].base), variant)
    for answer in answers:
        assert answer["fused"], "the FFNs ran opaque"
        assert max(answer["errors"].values()) < 1, answer["errors"]
        assert answer["tokens"]
        assert answer["bits"] == answers[0]["bits"], "ranks would drift apart"


def _two_dimensions(folder: str) -> tuple[bool, dict[str, float]]:
    """Sharded over two, split over two: each pair that shares the work has half of the batch."""
    from torch.nn.parallel import DistributedDataParallel
    from transformers.distributed import DistributedConfig

    base = split_base(folder, distributed_config=DistributedConfig(fsdp_size=2, tp_size=2))
    data = base._device_mesh["fsdp"]
    model: Any = memvp_model(base)
    model.memory = DistributedDataParallel(model.memory, process_group=data.get_group())
    fused: list[bool] = []
    with model.observing(
        lambda layer, x, y: fused.append(isinstance(model.memory_ffns()[layer][1].ffn_matrices(), Matrices))
    ):
        half = data.get_local_rank()
        loss = model(**{name: v[2 * half : 2 * half + 2] for name, v in batch(without=(1,)).items()}).loss
    loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss, group=data.get_group())
    return len(fused) == 2 and all(fused), reference(batch(without=(1,))).errors(loss / 2, adapter_gradients(model))


@fails_before(transformers="5.23")
def test_sharded_and_split(four: Group, tmp_path: Any) -> None:
    for fused, errors in four.run(_two_dimensions, saved_base(tmp_path)):
        assert fused
        assert max(errors.values()) < 1, errors


def _as_loaded(folder: str) -> tuple[bool, dict[str, float]]:
    """By the model's own plan, asked for by its older name."""
    model = memvp_model(split_base(folder, tp_plan="auto"))
    fused = all(
        isinstance(found, Matrices) and found.mesh is not None
        for found in (ffn.ffn_matrices() for _, ffn in model.memory_ffns())
    )
    loss = model(**batch(without=(1,))).loss
    loss.backward()
    return fused, reference(batch(without=(1,))).errors(loss, adapter_gradients(model))


def test_a_model_loaded_with_tp_plan_auto(two: Group, tmp_path: Any) -> None:
    for fused, errors in two.run(_as_loaded, saved_base(tmp_path)):
        assert fused
        assert max(errors.values()) < 1, errors


def _by_hooks() -> tuple[bool, list[str], dict[str, float]]:
    """torch's own parallelize_module, which hooks the layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    base = language_model()
    mesh = dist.init_device_mesh("cpu", (2,))
    columns, rows = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        (
            "self_attn.o_proj",
            "mlp.down_proj",
        ),
    )
    plan = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
    for layer in base.model.layers:
        parallelize_module(layer, mesh, plan)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("memvp_kernels").addHandler(handler)
    feed_forward.log_opaque.cache_clear()
    model = memvp_model(base)
    logging.getLogger("memvp_kernels").removeHandler(handler)
    opaque = all(isinstance(ffn.ffn_matrices(), Opaque) for _, ffn in model.memory_ffns())
    loss = model(**batch(without=(1,))).loss
    loss.backward()
    return opaque, said, reference(batch(without=(1,))).errors(loss, adapter_gradients(model))


def test_a_split_that_is_not_understood_is_right_all_the_same(two: Group) -> None:
    """The memory is whole on every rank and added after the reduce."""
    for opaque, said, errors in two.run(_by_hooks):
        assert opaque
        assert sum("parallelize_module" in line for line in said) == len(said) > 0, said
        assert max(errors.values()) < 1, errors


def _drift(folder: str) -> bytes:
    """Adapter after five steps with dropout, from ranks whose generators disagree."""
    torch.manual_seed(100 + dist.get_rank())
    model = memvp_model(split_base(folder), config=replace(CONFIG, dropout=0.3))
    optimizer = torch.optim.AdamW(model.memory.parameters(), lr=0.05)
    for _ in range(5):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.memory.parameters()]).numpy().tobytes()


def test_ranks_stay_equal_whatever_their_dropout_draws(two: Group, tmp_path: Any) -> None:
    first, second = two.run(_drift, saved_base(tmp_path))
    assert first == second


def _seeds(folder: str) -> list[int]:
    """Under one seed, dropout's own in each FFN."""
    from memvp_kernels import autograd

    torch.manual_seed(5)
    model = memvp_model(split_base(folder), config=replace(CONFIG, dropout=0.3))
    seeds = []

    def recorded(device: torch.device) -> Tensor:
        seed = draw_seed(device)
        seeds.append(int(seed))
        return seed

    autograd.draw_seed = recorded
    try:
        model(**batch())
    finally:
        autograd.draw_seed = draw_seed
    return [*seeds, int(draw_seed(torch.device("cpu")))]


def test_slots_of_different_ranks_are_not_dropped_together(two: Group, tmp_path: Any) -> None:
    first, second = two.run(_seeds, saved_base(tmp_path))
    assert len(first) == len(second) == 3
    assert not set(first[:2]) & set(second[:2])
    assert first[2] == second[2], "what draws next would differ between ranks"


def test_a_replaced_forward_that_is_not_transformers_own_is_not_read() -> None:
    linear = nn.Linear(4, 4)
    assert parallel.read_split(linear) is None

    def tp_forward(x: Tensor) -> Tensor:
        return x

    linear.forward = tp_forward  # type: ignore[method-assign]
    assert parallel.read_split(linear) is None
    tp_forward.__module__ = "transformers.distributed.tensor_parallel"
    assert parallel.read_split(linear) is None, "the name alone says nothing"


_OTHER_STYLES = ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "packed_colwise", "replicate")


def _styles() -> dict[str, str | None]:
    """What is read from layers under each of transformers' styles for a linear layer."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    mesh = dist.init_device_mesh("cpu", (2,))
    found = {}
    for name in ("colwise", "rowwise", *_OTHER_STYLES):
        linear = nn.Linear(4, 4)
        ALL_PARALLEL_STYLES[name].install_forward(linear, mesh)
        split = parallel.read_split(linear)
        found[name] = None if split is None else split.kind
    return found


@fails_before(transformers="5.23")
def test_only_the_two_plain_styles_are_read(two: Group) -> None:
    """Any other gathers, splits or packs what the fused FFN would take for a plain part."""
    wanted = dict.fromkeys(_OTHER_STYLES)
    assert two.run(_styles) == [{"colwise": "columns", "rowwise": "rows", **wanted}] * 2
