"""The ScienceQA example as a program, on a dozen questions in the official layout and tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scienceqa
import torch
from safetensors.torch import load_file

from tests.examples.conftest import EXAMPLES
from tests.examples.tiny_scienceqa import write_data, write_models
from tests.models.clip import official_state, save_official


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command-line options that name the data and the models."""
    root = tmp_path_factory.mktemp("scienceqa")
    language_model, clip = write_models(root)
    named = ["--data", write_data(root / "data"), "--language-model", language_model, "--vision-model", clip]
    return [*map(str, named), "--cpu", "--dtype", "float32", "--limit", "64"]


def train(parts: list[str], out: Path, *more: str) -> dict[str, torch.Tensor]:
    options = ["--slots", "8", "--epochs", "3", "--warmup", "1", "--rows", "4", "--workers", "0"]
    assert scienceqa.main(["train", *parts, "--out", str(out), *options, *more]) == 0
    return load_file(out / "memvp_model.safetensors")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(parts, out)
    return out


def test_training_learns_and_trains_every_part(parts: list[str], trained: Path, tmp_path: Path) -> None:
    log = losses(trained)
    assert len(log) == 3
    assert log[2] < log[0]
    start = train(parts, tmp_path, "--stop-after", "1")
    end = load_file(trained / "memvp_model.safetensors")
    assert sum(name.startswith("vision_model.") for name in end) == 2 * 2
    assert all(not torch.equal(start[name], end[name]) for name in end)


def test_a_stopped_run_goes_on_to_the_same_bits(parts: list[str], trained: Path, tmp_path: Path) -> None:
    train(parts, tmp_path, "--stop-after", "1")
    resumed = train(parts, tmp_path)
    straight = load_file(trained / "memvp_model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert losses(tmp_path) == losses(trained)


def test_a_finished_run_is_left_alone(parts: list[str], trained: Path) -> None:
    before = (trained / "memvp_model.safetensors").read_bytes()
    train(parts, trained)
    assert (trained / "memvp_model.safetensors").read_bytes() == before
    assert len(losses(trained)) == 3


def test_evaluation_prints_the_official_table(
    parts: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter", str(trained), "--predictions", str(tmp_path / "p.json"), "--rows", "3"]
    assert scienceqa.main(["evaluate", *parts, *options]) == 0
    printed = capsys.readouterr().out
    assert "4 questions of test, with captions" in printed
    saved = json.loads((tmp_path / "p.json").read_text())
    assert sorted(saved["predictions"], key=int) == ["9", "10", "11", "12"]
    head, figures = printed.splitlines()[-2:]
    assert head.split() == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert figures.split()[-1] == f"{saved['scores']['Avg']:.2f}"


def test_captions_are_the_same_in_training_and_evaluation(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(parts, tmp_path, "--no-captions", "--stop-after", "1")
    scienceqa.main(["evaluate", *parts, "--adapter", str(tmp_path)])
    assert "without captions" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'captions': False.*'captions': True.*another folder"):
        train(parts, tmp_path, "--captions")


def test_an_official_checkpoint_is_evaluated(
    parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_official(tmp_path / "c.pth", official_state(320, 32, 16, 128, inner=12), use_caption=True)
    assert scienceqa.main(["evaluate", *parts, "--adapter", str(path), "--split", "train"]) == 0
    printed = capsys.readouterr().out
    assert "adapter_modality_embedding.weight" in printed
    assert "8 questions of train, with captions" in printed
    silent = save_official(tmp_path / "s.pth", official_state(320, 32, 16, 128, inner=12))
    with pytest.raises(SystemExit, match="--captions or --no-captions"):
        scienceqa.main(["evaluate", *parts, "--adapter", str(silent)])


def test_bfloat16_models_train_a_float32_adapter(parts: list[str], tmp_path: Path) -> None:
    state = train([*parts, "--dtype", "bfloat16"], tmp_path, "--stop-after", "1")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_two_processes_have_the_gradient_of_one(parts: list[str], tmp_path: Path) -> None:
    """Half the rows each; dropout is off, whose draws depend on the process. Adam's first moment is the gradient's tenth."""
    options = ["--slots", "8", "--stop-after", "1", "--workers", "0", "--dropout", "0"]
    assert scienceqa.main(["train", *parts, "--out", str(tmp_path / "one"), "--rows", "8", *options]) == 0
    two = ["train", *parts, "--out", str(tmp_path / "two"), "--rows", "4", *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [*launcher, str(EXAMPLES / "scienceqa.py"), *two], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    moments = [
        torch.load(tmp_path / run / "last.pt", weights_only=True)["optimizer"]["state"] for run in ("one", "two")
    ]
    assert moments[0].keys() == moments[1].keys()
    largest = max(float(state["exp_avg"].norm()) for state in moments[0].values())
    assert largest > 0
    for index, state in moments[0].items():
        difference = float((moments[1][index]["exp_avg"] - state["exp_avg"]).norm())
        assert difference <= 1e-5 * largest, index  # float32 sums in another order
