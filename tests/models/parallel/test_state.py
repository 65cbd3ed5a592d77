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
from memvp_kernels.models.io.state import AdapterState
from tests.models.parallel.processes import Group
from tests.models.parallel.test_data_parallel import laid_out, part
from tests.models.parallel.tiny import batch, language_model, memvp_model, saved_base, split_base
from tests.models.tiny import shuffled

LAYOUTS = ("ddp", "ddp-memory", "fsdp2-root", "fsdp2-own", "fsdp2-recipe", "tp", "alone")


def _made(layout: str, base: str) -> tuple[Any, Any]:
    """A model and what is called in its stead."""
    if layout == "alone":
        model = memvp_model()
        return model, model
    if layout == "tp":
        model = memvp_model(split_base(base))
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


def _save(layout: str, folder: str, base: str) -> None:
    """Two steps, and both kinds of checkpoint."""
    import torch.distributed.checkpoint as dcp

    model, entry = _made(layout, base)
    optimizer = _optimizer(model)
    _train(layout, model, entry, optimizer, 2)
    model.save_pretrained(f"{folder}/plain")
    dcp.save({"adapter": AdapterState(entry, optimizer)}, checkpoint_id=f"{folder}/distributed")


def _resume(layout: str, folder: str, base: str) -> tuple[float, dict[str, Tensor]]:
    """How far the two kinds of checkpoint are from each other, and where two more steps lead from there."""
    import torch.distributed.checkpoint as dcp

    model, entry = _made(layout, base)
    model.load_adapter_state_dict(load_file(f"{folder}/plain/memvp_model.safetensors"))
    plain = model.adapter_state_dict()
    again, entry = _made(layout, base)
    optimizer = _optimizer(again)
    dcp.load({"adapter": AdapterState(entry, optimizer)}, checkpoint_id=f"{folder}/distributed")
    apart = max((t - plain[name]).abs().max().item() for name, t in again.adapter_state_dict().items())
    _train(layout, again, entry, optimizer, 2)
    return apart, again.adapter_state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The language model on disk."""
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(two: Group, tmp_path_factory: pytest.TempPathFactory, base: str) -> dict[str, str]:
    """Layout → folder, each saved once."""
    found = {}
    for layout in ("ddp-memory", "fsdp2-own", "tp"):
        folder = tmp_path_factory.mktemp(layout)
        two.run(_save, layout, str(folder), base)
        found[layout] = str(folder)
    return found


class Uninterrupted:
    """Four steps of one process in float64, and how far from there float32 may end, in parts of what the last two steps moved.

    Adam divides by the root of the second moment: where a gradient is near zero, the order of a float32 sum shows. So the limit
    takes the worst of a few orders, parameter by parameter.
    """

    def __init__(self) -> None:
        self.start, self.end = self._steps(language_model().double())
        orders = [self._steps(shuffled(language_model(), order))[1] for order in range(4)]
        self.limits = {name: 2 * max(self.strayed(end)[name] for end in orders) for name in self.end}

    @staticmethod
    def _steps(base: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = memvp_model(base)
        optimizer, found = _optimizer(model), []
        for _ in range(2):
            _train("alone", model, model, optimizer, 2)
            found.append({name: t.double().clone() for name, t in model.adapter_state_dict().items()})
        return found[0], found[1]

    def strayed(self, end: dict[str, Tensor]) -> dict[str, float]:
        """How far each parameter is from where it should be."""
        return {
            name: ((end[name] - wanted).norm() / (wanted - self.start[name]).norm()).item()
            for name, wanted in self.end.items()
        }


@pytest.fixture(scope="module")
def uninterrupted() -> Uninterrupted:
    return Uninterrupted()


@pytest.mark.parametrize(
    ("out_of", "into"),
    [
        *(("tp", into) for into in LAYOUTS),
        *((a, b) for a in ("ddp-memory", "fsdp2-own") for b in ("tp", "fsdp2-root", "alone")),
    ],
)
def test_training_goes_on_in_another_layout(
    two: Group, saved: dict[str, str], base: str, uninterrupted: Uninterrupted, out_of: str, into: str
) -> None:
    for apart, resumed in two.run(_resume, into, saved[out_of], base):
        assert apart == 0.0, "the two kinds of checkpoint differ"
        for name, strayed in uninterrupted.strayed(resumed).items():
            assert strayed <= uninterrupted.limits[name], name


def test_the_checkpoints_hold_the_adapter_alone(saved: dict[str, str]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    names = {n for n, _ in memvp_model().memory.named_parameters()}
    for folder in saved.values():
        assert sorted(p.name for p in Path(folder, "plain").iterdir()) == [
            "memvp_config.json",
            "memvp_model.safetensors",
        ]
        assert set(load_file(f"{folder}/plain/memvp_model.safetensors")) == names
        entries = FileSystemReader(f"{folder}/distributed").read_metadata().state_dict_metadata
        assert {n.removeprefix("adapter.model.memory.") for n in entries if n.startswith("adapter.model.")} == names
        assert not [n for n in entries if "language_model" in n]


def test_one_process_reads_what_many_wrote(saved: dict[str, str]) -> None:
    for folder in saved.values():
        model = MemVPModel.from_pretrained(language_model(), f"{folder}/plain")
        assert not dist.is_initialized()
        assert torch.isfinite(model(**batch()).loss)
