"""The formulas of bytes held and sent, against what a small model holds and sends on gloo processes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.models.parallel.counts import Preset, held, messages
from tests.models.parallel.processes import Group
from tests.models.parallel.test_data_parallel import laid_out
from tests.models.parallel.tiny import CONFIG, batch, language_model, memvp_model, saved_base, split_base
from tests.models.parallel.traffic import Traffic
from tests.models.tools import fails_before

SAMPLES, LENGTH = 4, 5
TINY = Preset(32, 64, 4, 4, 2, 64, CONFIG.num_slots, CONFIG.vision_dim, CONFIG.projector_dim)
Bytes = dict[tuple[str, int], int]  # (kind, bytes of the whole tensor) -> times


def wanted(mode: str, ranks: int, **sizes: int) -> Bytes:
    found: Counter[tuple[str, int]] = Counter()
    for m in messages(TINY, mode, ranks, **{"sequences": SAMPLES, "length": LENGTH, "element": 4} | sizes):
        found[m.kind, m.payload] += m.times
    return dict(found)


def test_parameters_and_images_are_those_of_the_model() -> None:
    model = memvp_model(language_model())
    assert TINY.base == sum(p.numel() for p in model.language_model.parameters())
    assert TINY.adapter == sum(p.numel() for p in model.memory.parameters())
    with torch.no_grad():
        core = model.encode_images(batch(samples=1)["image_features"])
        cache = language_model()(input_ids=torch.zeros(1, 9, dtype=torch.long), use_cache=True).past_key_values
    assert core.nbytes == TINY.image_bytes(element=4)
    assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == TINY.prompt_bytes(
        9, element=4
    )


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
    inputs = batch(SAMPLES, LENGTH)
    formula = [held(TINY._replace(layers=n), "ddp", 1, rows=SAMPLES * LENGTH, element=4)["activations"] for n in (2, 5)]
    assert _kept(5, inputs) - _kept(2, inputs) == formula[1] - formula[0]


def _step(model: Any) -> tuple[Bytes, set[str]]:
    model.gradient_checkpointing_enable()
    with Traffic() as traffic:
        model(**batch(SAMPLES, LENGTH)).loss.backward()
    return dict(traffic.bytes), traffic.unknown


def _ddp() -> Bytes:
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
    assert two.run(_ddp) == [wanted("ddp", 2)] * 2


def _fsdp2() -> tuple[Bytes, set[str]]:
    return _step(laid_out("fsdp2-recipe")[0])


def test_bytes_that_fsdp2_sends(two: Group) -> None:
    assert two.run(_fsdp2) == [(wanted("fsdp2", 2), set())] * 2


def _tensor_parallel(folder: str) -> tuple[Bytes, int, set[str], Bytes]:
    base = split_base(folder)
    stored = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in base.parameters())
    model = memvp_model(base)
    found, unknown = _step(model)
    model.eval()
    inputs = batch(SAMPLES, 1)
    del inputs["labels"]
    with torch.no_grad(), Traffic() as traffic:
        model(**inputs)
    return found, stored, unknown - {"_c10d_functional::_wrap_tensor_autograd"}, dict(traffic.bytes)


@fails_before(transformers="5.23")
@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_that_tensor_parallelism_sends_and_holds(
    request: pytest.FixtureRequest, ranks: int, tmp_path: Path
) -> None:
    """Of the memory nothing is sent for a token: embeddings, each layer's attention and FFN, logits."""
    group: Group = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    one_row = SAMPLES * TINY.width * 4
    token = {("all-reduce", one_row): 1 + 2 * TINY.layers, ("all-gather", SAMPLES * TINY.vocabulary * 4): 1}
    stored = held(TINY, "tp", ranks, rows=0, element=4)["base"]
    answers = group.run(_tensor_parallel, saved_base(tmp_path))
    assert answers == [(wanted("tp", ranks), stored, set(), token)] * ranks
