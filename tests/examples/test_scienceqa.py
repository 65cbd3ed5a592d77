"""The ScienceQA example as a program, on a dozen questions in the official layout and tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scienceqa
import torch
from safetensors.torch import load_file

from tests.examples.tiny_scienceqa import write_data, write_models
from tests.models.clip import adem_vl_state, official_state, save_official
from tests.models.parallel.processes import Group, free_port, meet


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


def checkpoint(out: Path) -> Path:
    """The last epoch's."""
    (found,) = out.glob("checkpoint-*")
    return found


def losses(out: Path) -> list[float]:
    history = json.loads((checkpoint(out) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


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
    head, _, figures = printed.splitlines()[-3:]
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


def test_adem_vl_is_trained_and_evaluated(parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = train(parts, tmp_path, "--stop-after", "1", "--method", "adem-vl", "--slots", "320")
    assert {name for name in state if name.startswith("class_projector.")}
    config = json.loads((tmp_path / "memvp_config.json").read_text())
    assert config["visual_map"] == "silu" and config["dropout"] == 0.0
    assert config["image_prefix"] and config["text_prefix"][: len(config["image_prefix"])] == config["image_prefix"]
    assert scienceqa.main(["evaluate", *parts, "--adapter", str(tmp_path)]) == 0
    file = save_official(
        tmp_path / "c.pth", adem_vl_state(320, 32, 16, 128, inner=12), use_caption=True, drop_ratio=0.1
    )
    options = ["--method", "adem-vl", "--adapter", str(file), "--split", "train"]
    assert scienceqa.main(["evaluate", *parts, *options]) == 0
    assert "adapter_proj_cls.fc1.weight" in capsys.readouterr().out


def test_bfloat16_models_train_a_float32_adapter(parts: list[str], tmp_path: Path) -> None:
    state = train([*parts, "--dtype", "bfloat16"], tmp_path, "--stop-after", "1")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(tensor.isfinite().all() for tensor in state.values())


def _main(port: int, arguments: list[str]) -> int:
    meet(port)
    return scienceqa.main(arguments)


def moments(out: Path) -> dict[int, torch.Tensor]:
    """Adam's first moments by parameter: the gradients of the steps, added up."""
    states = torch.load(checkpoint(out) / "optimizer.pt", weights_only=True)["state"]
    return {index: state["exp_avg"].double() for index, state in states.items()}


def test_two_processes_train_like_one(
    apart: Group, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of eight rows; dropout is off, whose draws depend on the process. Losses and every parameter's gradients.

    How far float32 may be from float64 is what one process shows that splits the eight rows in other ways.
    """
    options = ["--slots", "8", "--epochs", "3", "--warmup", "1", "--workers", "0", "--dropout", "0"]

    def alone(name: str, rows: int, *more: str) -> tuple[list[float], dict[int, torch.Tensor]]:
        split = ["--rows", str(rows), "--accumulate", str(8 // rows)]
        assert scienceqa.main(["train", *parts, "--out", str(tmp_path / name), *split, *options, *more]) == 0
        return losses(tmp_path / name), moments(tmp_path / name)

    monkeypatch.setitem(scienceqa.DTYPES, "float64", torch.float64)
    exact_losses, exact = alone("exact", 8, "--dtype", "float64")
    splits = [alone(f"by {rows}", rows) for rows in (8, 4, 2)]
    together = ["train", *parts, "--out", str(tmp_path / "two"), "--rows", "4", *options]
    assert apart.run(_main, free_port(), together) == [0, 0]
    found = moments(tmp_path / "two")
    assert found.keys() == exact.keys()
    for index, wanted in exact.items():
        limit = 2 * max(float((moment[index] - wanted).norm()) for _, moment in splits)
        assert float(wanted.norm()) > 0
        assert float((found[index] - wanted).norm()) <= limit, index
    for step, wanted_loss in enumerate(exact_losses):
        limit = 2 * max(abs(run[step] - wanted_loss) for run, _ in splits)
        assert abs(losses(tmp_path / "two")[step] - wanted_loss) <= limit, step


def _refused(folder: str, port: int) -> str:
    from accelerate import PartialState
    from science_questions import setup

    meet(port)
    state = PartialState(cpu=True)
    setup.agree_on_settings(state, Path(folder), captions=True)
    try:
        setup.agree_on_settings(state, Path(folder), captions=False)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_other_settings_are_refused_by_every_process(apart: Group, tmp_path: Path) -> None:
    """A process that went on alone would wait for the first one's gradients."""
    answers = apart.run(_refused, str(tmp_path), free_port())
    assert all("take another folder" in answer for answer in answers), answers
