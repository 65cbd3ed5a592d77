"""The formulas of bytes held and sent, against what a small model holds and sends on gloo processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.models.parallel import counts as paper
from tests.models.parallel.counts import Preset
from tests.models.parallel.processes import Group
from tests.models.parallel.tiny import CONFIG, batch, language_model, memvp_model, saved_base
from tests.models.parallel.traffic import Traffic

SAMPLES, LENGTH = 4, 5
FLOAT32 = 4

#: The tiny model of these tests.
TINY = Preset(
    width=32,
    pairs=64,
    heads=4,
    kv_heads=4,
    layers=2,
    vocabulary=64,
    slots=CONFIG.num_slots,
    vision_width=CONFIG.vision_dim,
    projector_width=CONFIG.projector_dim,
)


_SPLIT = replace(TINY, slots=16)


def _counted(collectives: Any) -> dict[tuple[str, int], int]:
    found: Counter[tuple[str, int]] = Counter()
    for c in collectives:
        found[c.kind, c.payload] += c.times
    return dict(found)


def test_parameters_are_those_of_the_model() -> None:
    model = memvp_model(language_model())
    assert paper.base_parameters(TINY) == sum(p.numel() for p in model.language_model.parameters())
    assert paper.adapter_parameters(TINY) == sum(p.numel() for p in model.memory.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_is_its_core(dtype: torch.dtype) -> None:
    model = memvp_model(language_model().to(dtype))
    with torch.no_grad():
        core = model.encode_images(batch(samples=1)["image_features"])
    assert core.numel() * core.element_size() == paper.image_bytes(TINY, element=dtype.itemsize)


def _kept(layers: int, inputs: dict[str, Any]) -> int:
    """Bytes that a step with checkpointing keeps for its backward."""
    model = memvp_model(language_model(num_hidden_layers=layers))
    model.gradient_checkpointing_enable()
    kept: dict[tuple[int, int], int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
            alive.append(t)
        return t

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**inputs).loss
    assert loss.requires_grad
    return sum(kept.values())


def test_a_layer_keeps_its_input() -> None:
    """What each further layer adds, checkpointed."""
    layout = paper.Layout("ddp", 1)
    inputs = batch(SAMPLES, LENGTH)
    formula = [
        paper.held(replace(TINY, layers=n), layout, sequences=SAMPLES, length=LENGTH, element=FLOAT32)["activations"]
        for n in (2, 5)
    ]
    assert _kept(5, inputs) - _kept(2, inputs) == formula[1] - formula[0]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
def test_a_prompt_s_image_is_its_keys_and_values(kv_heads: int) -> None:
    base = language_model(num_key_value_heads=kv_heads)
    cache = base(input_ids=torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == paper.prompt_bytes(replace(TINY, kv_heads=kv_heads), visual_tokens=9, element=FLOAT32)


def test_a_base_in_nf4() -> None:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="needs the `quantized` extra: pip install memvp_kernels[quantized]"
    )
    base = language_model()
    held = 0
    for name, parameter in base.named_parameters():
        if name.startswith("model.layers.") and parameter.dim() == 2:
            packed = bnb.nn.Params4bit(parameter.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
            packed = packed.to("cpu")
            state = packed.quant_state
            held += packed.numel() * packed.element_size() + state.absmax.numel() * state.absmax.element_size()
        else:
            held += parameter.numel() * FLOAT32
    assert held == paper.base_bytes(TINY, element=FLOAT32, nf4=True)


def _step(model: Any) -> tuple[dict[tuple[str, int], int], set[str]]:
    model.gradient_checkpointing_enable()
    with Traffic() as traffic:
        model(**batch(SAMPLES, LENGTH)).loss.backward()
    return dict(traffic.bytes), traffic.unknown


def _ddp() -> dict[tuple[str, int], int]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    inner = memvp_model()
    inner.gradient_checkpointing_enable()
    model = DistributedDataParallel(inner)
    buckets: Counter[tuple[str, int]] = Counter()

    def count(state, bucket):  # type: ignore[no-untyped-def]  # C++ reducers do not pass the dispatcher
        buckets["all-reduce", bucket.buffer().nbytes] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, count)
    model(**batch(SAMPLES, LENGTH)).loss.backward()
    return dict(buckets)


def test_bytes_that_ddp_sends(two: Group) -> None:
    wanted = _counted(paper.training_collectives(TINY, paper.Layout("ddp", 2), sequences=SAMPLES, length=LENGTH))
    assert wanted
    assert two.run(_ddp) == [wanted] * 2


def _fsdp2() -> tuple[dict[tuple[str, int], int], set[str]]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = memvp_model()
    for layer in model.language_model.model.layers:
        fully_shard(layer)
    fully_shard(model.language_model)
    model.memory = DistributedDataParallel(model.memory)  # type: ignore[assignment]
    return _step(model)


def test_bytes_that_fsdp2_sends(two: Group) -> None:
    layout = paper.Layout("fsdp2", 2)
    wanted = _counted(paper.training_collectives(TINY, layout, sequences=SAMPLES, length=LENGTH, element=FLOAT32))
    for found, unknown in two.run(_fsdp2):
        assert not unknown
        assert found == wanted


def _tensor_parallel(folder: str) -> tuple[dict[tuple[str, int], int], int, set[str], dict[tuple[str, int], int]]:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    base = LlamaForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size()), attn_implementation="eager"
    )
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in base.parameters())
    model = memvp_model(base)
    found, unknown = _step(model)
    model.eval()
    inputs = batch(SAMPLES, 1)
    del inputs["labels"]
    with torch.no_grad(), Traffic() as traffic:
        model(**inputs)
    return found, held, unknown - {"_c10d_functional::_wrap_tensor_autograd"}, dict(traffic.bytes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_that_tensor_parallelism_sends_and_holds(
    request: pytest.FixtureRequest, ranks: int, tmp_path: Path
) -> None:
    group: Group = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    layout = paper.Layout("tp", ranks)
    wanted = _counted(  # the ranks work on the same sequences
        paper.training_collectives(TINY, layout, sequences=SAMPLES // ranks, length=LENGTH, element=FLOAT32)
    )
    decoded = _counted(paper.decode_collectives(TINY, layout, sequences=SAMPLES, element=FLOAT32))
    for found, held, unknown, one_token in group.run(_tensor_parallel, saved_base(tmp_path)):
        assert not unknown
        assert found == wanted
        assert one_token == decoded
        assert held == paper.held(TINY, layout, sequences=0, length=0, element=FLOAT32)["base"]


def _memory_flops(slots: int, rank: int, width: int, rows: int) -> int:
    """Of the memory's products as the torch backend runs them: forward, forward again under checkpointing, and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    from memvp_kernels.backends.torch import eager
    from memvp_kernels.problem import Problem, Segments

    core = torch.randn(1, slots, rank)
    problem = Problem(
        x=torch.randn(rows, width),
        **dict.fromkeys(("key", "value", "gate", "key_bias", "gate_bias", "value_bias", "residual", "seed")),
        visual_key=core,
        visual_value=core,
        visual_basis=torch.randn(rank, width),
        key_position=torch.randn(slots, width),
        value_position=torch.randn(slots, width),
        segments=Segments(rows, 1, rows, shared=True),
        activation="silu",
        visual_activation="silu",
        visual_scale=1.0,
        dropout_p=0.0,
    )
    needs = frozenset(("x", "visual_key", "visual_value", "visual_basis", "key_position", "value_position"))

    def in_place(out: Any, left: Any, right: Any, **_: Any) -> int:  # PyTorch's counter does not know addmm_
        return int(2 * left[0] * left[1] * right[1])

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        eager.forward(problem, save_hidden=False, save_scores=False)
        y, _, scores = eager.forward(problem, save_hidden=False, save_scores=True)
        eager.backward(problem, y, None, scores, needs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("ranks", [2, 4])
def test_flops_that_the_split_by_slots_repeats(ranks: int) -> None:
    rows = 10
    of_a_rank = _memory_flops(_SPLIT.slots // ranks, _SPLIT.rank, _SPLIT.width, rows)
    whole = _memory_flops(_SPLIT.slots, _SPLIT.rank, _SPLIT.width, rows)
    assert ranks * of_a_rank - whole == (ranks - 1) * paper.repeated_flops(_SPLIT) * rows
