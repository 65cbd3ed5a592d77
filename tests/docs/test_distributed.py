"""The recipes of docs/distributed.md, run as written on a tiny LLaMA, each against one process that does the whole of it."""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memvp_kernels
from memvp_kernels import MemVPConfig, MemVPModel
from tests.docs.pages import ROOT, blocks
from tests.models.parallel.processes import Group, free_port
from tests.models.parallel.tiny import difference, language_model, saved_base
from tests.models.tiny import shuffled

BLOCKS = [code.lstrip() for code in blocks(ROOT / "docs" / "distributed.md")]
IMPORTS, *_RECIPES, LOOP, CHECKPOINT = BLOCKS
RECIPES = dict(zip(("ddp", "fsdp2", "tp", "4 bits"), _RECIPES, strict=True))
STEPS, ROWS, TOKENS = 2, 4, 20  # more than a quantized base runs by its own kernels
CONFIG = MemVPConfig(dropout=0.0)  # the recipes' own but for dropout, which no other process draws alike


def program(recipe: str) -> str:
    """The imports, the recipe, the loop and the checkpoint."""
    return "\n".join([IMPORTS, RECIPES[recipe], LOOP, CHECKPOINT])


def batches(rank: int = 0, ranks: int = 1) -> list[dict[str, Tensor]]:
    """This rank's share of each step's questions, with features of CLIP ViT-L/14's width."""
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 64, (ROWS, TOKENS), generator=generator)
        features = torch.randn(ROWS, 256, 1024, generator=generator)
        mine = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        found.append({"input_ids": ids[mine], "labels": ids[mine], "image_features": features[mine]})
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The programs and a language model, in a folder of their own."""
    for recipe in RECIPES:
        (tmp_path / f"{recipe}.py").write_text(program(recipe))
    saved_base(tmp_path / "your-llama")
    return tmp_path


def means(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Adam's first moments by parameter: the gradients of the steps, added up."""
    names = {parameter: name.replace("module.", "") for name, parameter in model.named_parameters()}
    return {names[p]: state["exp_avg"].detach().clone() for p, state in optimizer.state.items()}


def _run(recipe: str, folder: str, port: int) -> dict[str, Tensor]:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.chdir(folder)
    apart = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if recipe != "tp" else (0, 1)
    memvp_kernels.MemVPConfig = functools.partial(MemVPConfig, dropout=0.0)  # type: ignore[assignment, misc]
    try:
        names = runpy.run_path(f"{recipe}.py", {"batches": batches(*apart)}, run_name="__main__")
    finally:
        memvp_kernels.MemVPConfig = MemVPConfig  # type: ignore[misc]
    found = means(names["model"], names["optimizer"])
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


class Alone:
    """One process: what it computes in float64, and how far it may be from that in bfloat16, parameter by parameter.

    Args:
        base: the language model, at every call anew, in a dtype.
    """

    def __init__(self, base: Callable[[torch.dtype, int | None], Any]) -> None:
        torch.manual_seed(0)
        self.start = self._trainable(MemVPModel(base(torch.bfloat16, None), CONFIG))
        self.exact = self._trained(base(torch.float64, None))
        runs = [self._trained(base(torch.bfloat16, order)) for order in range(4)]
        self.limits = {
            name: 2 * max(difference(run[name], exact) for run in runs) for name, exact in self.exact.items()
        }

    def check(self, found: dict[str, Tensor]) -> None:
        """Every parameter's sum of gradients is within its limit."""
        assert found.keys() == self.exact.keys()
        for name, exact in self.exact.items():
            assert 0 < difference(found[name], exact) <= self.limits[name], name

    @staticmethod
    def _trainable(model: MemVPModel) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _trained(self, base: Any) -> dict[str, Tensor]:
        model = MemVPModel(base, CONFIG).train()
        for name, parameter in self._trainable(model).items():
            parameter.copy_(self.start[name])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for batch in batches():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return means(model, optimizer)


def _plain(dtype: torch.dtype, order: int | None) -> Any:
    base = language_model().to(torch.bfloat16)  # the weights that the recipes load
    return (base if order is None else shuffled(base, order)).to(dtype)


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone(_plain)


def _check_saved(folder: Path) -> dict[str, Tensor]:
    assert MemVPConfig.load(folder / "adapter" / "memvp_config.json").num_slots == 320
    assert (folder / "checkpoint" / ".metadata").is_file()
    state = load_file(folder / "adapter" / "memvp_model.safetensors")
    assert all(t.any() and torch.isfinite(t).all() for t in state.values())
    return state


@pytest.mark.parametrize("recipe", ["ddp", "fsdp2", "tp"])
def test_two_processes(apart: Group, folder: Path, alone: Alone, recipe: str) -> None:
    answers = apart.run(_run, recipe, str(folder), free_port())
    for found in answers:
        alone.check(found)
        assert all(torch.equal(found[name], first) for name, first in answers[0].items()), "ranks would drift apart"
    _check_saved(folder)


def test_torchrun(folder: Path) -> None:
    """The real launcher, once, with the dropout that the recipe has."""
    for rank in range(2):
        torch.save(batches(rank, 2), folder / f"batches-{rank}.pt")
    read = "import os\n\nimport torch\n\nbatches = torch.load(f\"batches-{os.environ['RANK']}.pt\")\n"
    (folder / "train.py").write_text(read + program("ddp"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    subprocess.run(command, cwd=folder, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _check_saved(folder)


def _unpacked(folder: Path) -> Callable[[torch.dtype, int | None], Any]:
    """What the 4-bit recipe trains over, its matrices dequantized once and for all."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from memvp_kernels.models.parallel.quantized import QuantizedLinear, read_quantized

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    source = AutoModelForCausalLM.from_pretrained(folder / "your-llama", dtype=torch.bfloat16, quantization_config=nf4)
    dequantized = {}
    for name, module in source.named_modules():
        found = read_quantized(module)
        if isinstance(found, QuantizedLinear):
            dequantized[f"{name}.weight"] = found.dequantize(torch.bfloat16)
    assert dequantized

    def base_of(dtype: torch.dtype, order: int | None) -> Any:
        base = language_model().to(torch.bfloat16)
        base.load_state_dict(dequantized, strict=False)
        base = (base if order is None else shuffled(base, order)).to(dtype)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

    return base_of


def test_a_4_bit_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the `quantized` extra: pip install memvp_kernels[quantized]")
    pytest.importorskip("peft")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(memvp_kernels, "MemVPConfig", functools.partial(MemVPConfig, dropout=0.0))
    names: dict[str, Any] = runpy.run_path("4 bits.py", {"batches": batches()}, run_name="__main__")
    kinds = {type(ffn.up_proj).__name__ for _, ffn in names["model"].memory_ffns()}
    assert kinds == {"Linear4bit"}
    found = means(names["model"], names["optimizer"])
    assert any("lora" in name for name in found)
    Alone(_unpacked(folder)).check(found)
    _check_saved(folder)
