"""Tensor parallelism: outputs and gradients of ranks that share the work equal those of one process that does it all."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memvp_kernels import MemVPConfig, MemVPModel, fused_ffn
from memvp_kernels.autograd import draw_seed
from memvp_kernels.models.memory.visual_memory import Memory
from memvp_kernels.models.parallel import tensor_parallel as parallel
from memvp_kernels.models.patching import feed_forward
from memvp_kernels.models.patching.weights import Matrices, Opaque
from tests.models.parallel.processes import Group
from tests.models.parallel.tiny import (
    ADEM_VL,
    CONFIG,
    adapter_gradients,
    batch,
    difference,
    language_model,
    memvp_model,
    reference,
    saved_base,
)
from tests.models.tools import fails_before

# --- the operator alone -------------------------------------------------------------------------------------------------------


def _operands(slots: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = {
        "x": (3, 4, 8), "key": (12, 8), "gate": (12, 8), "value": (12, 8), "core": (3, slots, 5), "basis": (5, 8),
        "key_position": (slots, 8), "value_position": (slots, 8),
    }  # fmt: skip
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_(
            name not in ("key", "gate", "value")
        )
        for name, size in sizes.items()
    }


def _ffn(t: dict[str, Tensor], memory: Memory, x: Tensor, pairs: slice) -> Tensor:
    return fused_ffn(
        x, t["key"][pairs], t["value"][pairs], memory.core, memory.core, gate=t["gate"][pairs], visual_basis=memory.basis,
        key_position=memory.key_position, value_position=memory.value_position, visual_scale=memory.scale,
    )  # fmt: skip


def _memory(t: dict[str, Tensor]) -> Memory:
    return Memory(t["core"], t["basis"], t["key_position"], t["value_position"], scale=0.5, dropout=0.0)


def _gradients(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.grad for name, tensor in t.items() if tensor.grad is not None}


def _split_operator(slots: int, tp: int) -> tuple[float, dict[str, float], list[str], int]:
    """The worst errors of this rank's output and gradients, what the backward sent, and this rank's slots."""
    mesh = dist.init_device_mesh("cpu", (tp,)) if tp == dist.get_world_size() else None
    whole, own = _operands(slots), _operands(slots)
    want = _ffn(whole, _memory(whole), whole["x"], slice(None))
    want.square().sum().backward()
    part = parallel.shard_slots(_memory(own), mesh)
    pairs = 12 // tp
    mine = slice(pairs * mesh.get_local_rank(), pairs * (mesh.get_local_rank() + 1))
    y = parallel.all_reduce(_ffn(own, part, parallel.sum_gradients(own["x"], mesh), mine), mesh)
    y.square().sum().backward()
    errors = {name: difference(grad, _gradients(whole)[name]) for name, grad in _gradients(own).items()}
    return difference(y, want), errors, sorted(errors), part.core.shape[1]


@pytest.mark.parametrize("slots", [8, 6, 3, 1, 0])
def test_slots_split_over_four_ranks_give_every_gradient_whole(four: Group, slots: int) -> None:
    answers = four.run(_split_operator, slots, 4)
    for y, errors, names, _ in answers:
        assert names == ["basis", "core", "key_position", "value_position", "x"]
        assert y < 1e-14
        assert all(error < 1e-14 for error in errors.values()), errors
    assert sum(own for *_, own in answers) == slots
    if slots < 4:
        assert answers[-1][-1] == 0, "a rank without slots was meant to be among them"


def _wrong_splits() -> dict[str, float]:
    """What the mistakes that raise nothing do to the gradient of p^k."""
    mesh = dist.init_device_mesh("cpu", (2,))
    whole = _operands(4)
    _ffn(whole, _memory(whole), whole["x"], slice(None)).square().sum().backward()
    mine = slice(6 * mesh.get_local_rank(), 6 * (mesh.get_local_rank() + 1))
    found = {}
    for mistake in ("none", "plain slots", "f left out", "torch's all_reduce"):
        t = _operands(4)
        memory = _memory(t)
        slots = slice(2 * mesh.get_local_rank(), 2 * (mesh.get_local_rank() + 1))
        part = parallel.shard_slots(memory, mesh)
        if mistake == "plain slots":
            part = dataclasses.replace(
                memory,
                core=memory.core[:, slots],
                key_position=memory.key_position[slots],
                value_position=memory.value_position[slots],
            )
        x = t["x"] if mistake == "f left out" else parallel.sum_gradients(t["x"], mesh)
        y = _ffn(t, part, x, mine)
        if mistake == "torch's all_reduce":
            import torch.distributed.nn.functional as collectives

            y = collectives.all_reduce(y)
        else:
            y = parallel.all_reduce(y, mesh)
        y.square().sum().backward()
        name = "x" if mistake == "f left out" else "key_position"
        found[mistake] = difference(_gradients(t)[name], _gradients(whole)[name])
    return found


def test_each_part_of_the_split_is_needed(two: Group) -> None:
    """Slots without a gathering backward, x without f, and an all_reduce that reduces again backward are wrong in silence."""
    for found in two.run(_wrong_splits):
        assert found.pop("none") < 1e-14
        assert all(error > 0.1 for error in found.values()), found


# --- MemVPModel over a model that transformers has split ----------------------------------------------------------------------


def parallel_model(folder: str, **options: Any) -> MemVPModel:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    world = dist.get_world_size()
    base = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=world), attn_implementation="eager"
    )
    return memvp_model(base, **options)


class Variant(NamedTuple):
    """What differs from the tiny model of the other tests."""

    base: dict[str, Any]
    config: MemVPConfig = CONFIG
    checkpointing: bool = False
    recompute: bool = False


VARIANTS = {
    "plain": Variant({}),
    "checkpointing": Variant({}, checkpointing=True),
    "recompute": Variant({}, recompute=True),
    "biases": Variant({"mlp_bias": True}),  # down_proj's is added once, after the reduce
    "a pair of positions per layer": Variant({}, replace(CONFIG, shared_positions=False)),
    "ADEM-VL": Variant({}, replace(ADEM_VL, class_token=False, text_prefix=())),
    "grouped queries, odd widths": Variant({"num_key_value_heads": 2, "intermediate_size": 57}),
}


def _train_and_generate(folder: str, name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    inputs = batch(without=(1,))
    wanted = reference(inputs, config=variant.config, base=lambda: language_model(**variant.base))
    model = parallel_model(folder, config=variant.config, recompute=variant.recompute)
    if variant.checkpointing:
        model.gradient_checkpointing_enable()
    fused = [isinstance(ffn.ffn_matrices(), Matrices) for _, ffn in model.memory_ffns()]
    out = model(**inputs).loss
    out.backward()
    found = adapter_gradients(model)
    generation = {k: v for k, v in batch().items() if k != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = memvp_model(language_model(**variant.base), variant.config).eval().generate(**generation, **options)
    together = model.eval().generate(**generation, **options)
    return {
        "fused": all(fused),
        "errors": wanted.errors(out, found),
        "tokens": torch.equal(alone, together),
        "bits": torch.cat([g.flatten() for g in found.values()]).numpy().tobytes(),
    }


@pytest.mark.parametrize(("ranks", "variant"), [*((2, name) for name in VARIANTS), (4, "plain"), (4, "checkpointing")])
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
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    base = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(fsdp_size=2, tp_size=2), attn_implementation="eager"
    )
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
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager")
    model = memvp_model(base)
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
    model = parallel_model(folder, config=replace(CONFIG, dropout=0.3))
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
    model = parallel_model(folder, config=replace(CONFIG, dropout=0.3))
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


class _Mesh:
    """As much of a mesh as a draw needs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def get_local_rank(self) -> int:
        return self.rank

    def size(self) -> int:
        return 4


def test_ranks_under_one_seed_draw_different_masks_and_go_on_together() -> None:
    seeds, states = [], []
    for rank in range(4):
        torch.manual_seed(3)
        with parallel.rank_local_rng(_Mesh(rank), torch.device("cpu"), 0.1):
            seeds.append(draw_seed(torch.device("cpu")).item())
        states.append(torch.get_rng_state())
    assert len(set(seeds)) == 4
    assert all(torch.equal(state, states[0]) for state in states)


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
