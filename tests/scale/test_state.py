"""The adapter's state goes from any layout into any other, with nothing of the base in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from memvp_kernels import MemVPModel
from memvp_kernels.models.state import AdapterState
from tests.scale.processes import Group
from tests.scale.test_data_parallel import laid_out, part
from tests.scale.tiny import batch, language_model, memvp_model, saved_base

LAYOUTS = ("ddp", "ddp-memory", "fsdp2-root", "fsdp2-own", "fsdp2-recipe", "tp", "alone")


def _made(layout: str, base: str) -> tuple[Any, Any]:
    """A model and what is called in its stead."""
    if layout == "alone":
        model = memvp_model()
        return model, model
    if layout == "tp":
        from tests.scale.test_tensor_parallel import parallel_model

        model = parallel_model(base)
        return model, model
    return laid_out(layout)


def _optimizer(model: MemVPModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def _train(layout: str, model: MemVPModel, entry: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        inputs = batch(without=(2,))
        entry(**(inputs if layout in ("tp", "alone") else part(inputs))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(layout: str, folder: str, base: str) -> dict[str, Tensor]:
    """Two steps, both kinds of checkpoint, and where two more steps lead."""
    import torch.distributed.checkpoint as dcp

    model, entry = _made(layout, base)
    optimizer = _optimizer(model)
    _train(layout, model, entry, optimizer, 2)
    model.save_pretrained(f"{folder}/plain")
    dcp.save({"adapter": AdapterState(entry, optimizer)}, checkpoint_id=f"{folder}/distributed")
    _train(layout, model, entry, optimizer, 2)
    return model.adapter_state_dict()


def _resume(layout: str, folder: str, base: str, forget: bool) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """How far the two kinds of checkpoint are from each other; what they hold; where two more steps lead from there."""
    import torch.distributed.checkpoint as dcp

    model, entry = _made(layout, base)
    model.load_adapter_state_dict(load_file(f"{folder}/plain/memvp_model.safetensors"))
    plain = model.adapter_state_dict()
    again, entry = _made(layout, base)
    optimizer = _optimizer(again)
    state = AdapterState(entry) if forget else AdapterState(entry, optimizer)
    dcp.load({"adapter": state}, checkpoint_id=f"{folder}/distributed")
    apart = max((t - plain[name]).abs().max().item() for name, t in again.adapter_state_dict().items())
    _train(layout, again, entry, optimizer, 2)
    return apart, plain, again.adapter_state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The language model on disk."""
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(two: Group, tmp_path_factory: pytest.TempPathFactory, base: str) -> dict[str, Any]:
    """Layout → (folder, adapter two steps later), each saved once."""
    found = {}
    for layout in ("ddp-memory", "fsdp2-own", "tp"):
        folder = tmp_path_factory.mktemp(layout)
        found[layout] = (str(folder), two.run(_save, layout, str(folder), base)[0])
    return found


def _strayed(start: dict[str, Tensor], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """How far the last two steps led elsewhere, in parts of how far they led; the worst parameter's."""
    return max(((found[n] - wanted[n]).norm() / (wanted[n] - start[n]).norm()).item() for n in wanted)


@pytest.mark.parametrize("into", LAYOUTS)
@pytest.mark.parametrize("out_of", ["ddp-memory", "fsdp2-own", "tp"])
def test_training_goes_on_in_another_layout(
    two: Group, saved: dict[str, Any], base: str, out_of: str, into: str
) -> None:
    folder, uninterrupted = saved[out_of]
    for apart, start, resumed in two.run(_resume, into, folder, base, False):
        assert apart == 0.0, "the two kinds of checkpoint differ"
        # Adam divides by the root of the second moment: where a gradient is near zero, the order of a float32 sum shows
        assert _strayed(start, resumed, uninterrupted) < 1e-3


def test_an_optimizer_that_forgets_strays(two: Group, saved: dict[str, Any], base: str) -> None:
    """What the bound above would not let pass."""
    folder, uninterrupted = saved["ddp-memory"]
    _, start, resumed = two.run(_resume, "ddp-memory", folder, base, True)[0]
    assert _strayed(start, resumed, uninterrupted) > 0.1


def test_the_checkpoints_hold_the_adapter_alone(saved: dict[str, Any]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = {n for n, _ in memvp_model().memory.named_parameters()}
    for folder, _ in saved.values():
        assert sorted(p.name for p in Path(folder, "plain").iterdir()) == [
            "memvp_config.json",
            "memvp_model.safetensors",
        ]
        assert set(load_file(f"{folder}/plain/memvp_model.safetensors")) == names
        entries = FileSystemReader(f"{folder}/distributed").read_metadata().state_dict_metadata
        assert {n.removeprefix("adapter.model.memory.") for n in entries if n.startswith("adapter.model.")} == names
        assert not [n for n in entries if "language_model" in n]


def test_one_process_reads_what_many_wrote(saved: dict[str, Any]) -> None:
    for folder, _ in saved.values():
        model = MemVPModel.from_pretrained(language_model(), f"{folder}/plain")
        assert not dist.is_initialized()
        assert torch.isfinite(model(**batch()).loss)
