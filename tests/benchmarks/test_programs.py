"""Each program once, whole, with the smallest preset: its table, its file, its exit status."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, NoReturn

import kernels
import latency
import pytest
import record
import sweep
import training
from harness import commit as commits
from harness import operator_case
from harness.cli import Setting, common_parser, settle
from harness.results import load

from tests.benchmarks.conftest import BENCHMARKS

VARIANTS = {
    "prompt", "text", "official-eager", "formed-eager", "factored-eager", "concatenated", "liger", "plain-torch", "factored-torch",
}  # fmt: skip


def options(folder: Path, *more: str, samples: int = 2) -> list[str]:
    files = ["--json", str(folder / "rows.json"), "--plot", str(folder / "picture.png")]
    return ["--device", "cpu", "--quick", "--quiet", "--samples", str(samples), *files, *more]


def statuses(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in load(path)["rows"]:
        found.setdefault(row["variant"], set()).add(row["status"])
    return found


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(options(tmp_path)) == 0
    found = statuses(tmp_path / "rows.json")
    assert set(found) == {*VARIANTS, "MemVPModel"}
    assert {name for name, status in found.items() if status != {"ok"}} == {"liger"}
    rows = load(tmp_path / "rows.json")["rows"]
    assert {row["phase"] for row in rows if row["variant"] == "MemVPModel"} == {"prefill", "decode"}
    assert all(row["first_call_s"] > 0 for row in rows if row["status"] == "ok")
    assert {(row["level"], row["phase"]) for row in rows} == {
        (a, b) for a in ("ffn", "model") for b in ("prefill", "decode")
    }
    assert all(
        row["cache_per_image_bytes"] > 0 for row in rows if row["variant"] == "prompt" and row["level"] == "model"
    )
    assert all(row["speedup_vs_prompt"] == 1 for row in rows if row["variant"] == "prompt")  # nothing is compiled here
    assert all(row["peak_memory_bytes"] > 0 and row["floor_ms"] > 0 for row in rows if row["status"] == "ok")
    printed = capsys.readouterr().out
    assert "model, first token 2×8, image 16" in printed
    assert "× prompt" in printed
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize("switches", [(), ("--checkpointing", "--recompute", "--dtype", "bfloat16")])
def test_training(tmp_path: Path, switches: tuple[str, ...]) -> None:
    assert training.main(options(tmp_path, *switches)) == 0
    found = statuses(tmp_path / "rows.json")
    assert set(found) == {*VARIANTS, "MemVPModel"}
    assert {name for name, status in found.items() if status != {"ok"}} == {"liger"}
    cases = {row["case"] for row in load(tmp_path / "rows.json")["rows"]}
    assert any(case.startswith("ffn") for case in cases) is not bool(switches)  # checkpointing wraps layers
    assert all(("checkpointing, recompute" in case) is bool(switches) for case in cases)


def test_sweep(tmp_path: Path) -> None:
    sizes = ("--text-length", "8", "4", "--visual-tokens", "16", "8", "--layers", "1")
    assert sweep.main(options(tmp_path, *sizes)) == 0
    rows = load(tmp_path / "rows.json")["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["variant"] for row in rows} == {
        "prompt", "text", "official-eager", "factored-torch", "MemVPModel",
    }  # fmt: skip
    for phase in ("prefill", "decode", "training"):
        found = {(row["text_length"], row["visual_tokens"]) for row in rows if row["phase"] == phase}
        assert found == {(8, 16), (4, 16), (8, 8)}  # one size at a time
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert training.main(options(tmp_path, "--quantized", "--preset", "tiny", "--layers", "1", samples=1)) == 0
    rows = {row["variant"]: row for row in load(tmp_path / "rows.json")["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"MemVPModel": "ok", "MemVPModel-nf4": "ok"}
    assert rows["MemVPModel-nf4"]["peak_memory_bytes"] < rows["MemVPModel"]["peak_memory_bytes"]


def test_without_bitsandbytes_its_row_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert training.main(options(tmp_path, "--quantized", samples=1)) == 0
    rows = {row["variant"]: row["reason"] for row in load(tmp_path / "rows.json")["rows"]}
    assert rows == {"MemVPModel": "", "MemVPModel-nf4": "bitsandbytes is not installed"}


def test_switches_do_not_overwrite_the_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[tuple[str, str]] = []

    def run(program: str, setting: Setting, jobs: object) -> NoReturn:
        files.append((program, str(setting.json)))
        raise InterruptedError

    monkeypatch.setattr(training, "run", run)
    for switches in ((), ("--checkpointing",), ("--checkpointing", "--recompute"), ("--quantized",)):
        with pytest.raises(InterruptedError):
            training.main(["--device", "cpu", "--quick", *switches])
    assert files == [
        (name, f"out/{name}.json")
        for name in ("training", "training-checkpointing", "training-checkpointing-recompute", "training-quantized")
    ]


def test_an_operator_case_dies_with_its_turn() -> None:
    """On a GPU every case that stays alive keeps its gigabytes."""
    parsed = common_parser("", program="kernels").parse_args(["--device", "cpu", "--quick"])
    setting = settle(parsed, cpu=kernels.CPU, cuda=kernels.CUDA)
    made: list[weakref.ref[object]] = []

    class Problem(operator_case._Problem):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator_case, "_Problem", Problem)
        found = operator_case.backward_candidates(setting, sequences=2, text_length=4, visual_tokens=8)
    candidate = next(candidate for candidate in found if candidate.name == "factored-torch")
    outputs, run, _ = candidate.build()
    candidate.truth()
    del found, candidate, outputs, run
    gc.collect()
    assert [reference() for reference in made] == [None]


def test_checkpointing_is_less_memory(tmp_path: Path) -> None:
    peaks = []
    for name, switches in (("without", ()), ("with", ("--checkpointing",))):
        folder = tmp_path / name
        sizes = ("--layers", "2", "--text-length", "256", "--variants", "factored-torch")
        assert training.main(options(folder, *sizes, *switches, samples=1)) == 0
        rows = load(folder / "rows.json")["rows"]
        peaks += [
            row["peak_memory_bytes"] for row in rows if row["variant"] == "factored-torch" and row["level"] == "model"
        ]
    assert peaks[1] < peaks[0]


def test_kernels(tmp_path: Path) -> None:
    assert kernels.main(options(tmp_path)) == 0
    found = statuses(tmp_path / "rows.json")
    assert found["matmul"] == {"ok"}
    assert found["triton"] <= {"skipped", "ok"}  # "ok" where the interpreter runs them
    assert found["factored-torch"] == {"ok"}
    cases = {row["case"].split(" 2×")[0] for row in load(tmp_path / "rows.json")["rows"]}
    assert cases == {
        "training forward",
        "training backward",
        *(f"kernel {name}" for name in ("hidden", "output", "dhidden", "dinput", "dmemory", "core", "dcore")),
    }


def test_host_overhead() -> None:
    """`make bench` itself takes its time; that its functions run is a matter of seconds."""
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    # As `make bench` has it: kernels are compiled, not interpreted, though none is launched.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(BENCHMARKS / "host_overhead.py")],
        cwd=BENCHMARKS.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_time_limit_leaves_cases_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(options(tmp_path, "--seconds", "0", samples=1)) == 0
    printed = capsys.readouterr().out
    assert "not begun, because --seconds 0 were over:\n  model, first token 2×8, image 16\n" in printed


def test_only_the_variants_asked_for(tmp_path: Path) -> None:
    assert latency.main(options(tmp_path, "--variants", "plain-torch", samples=1)) == 0
    assert set(statuses(tmp_path / "rows.json")) == {"prompt", "plain-torch"}


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit, match="PyTorch sees none"):
        latency.main(["--device", "cuda", "--json", str(tmp_path / "rows.json")])


def test_without_transformers_the_ffn_is_still_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert latency.main(options(tmp_path, "--variants", "plain-torch", samples=1)) == 0
    rows = load(tmp_path / "rows.json")["rows"]
    assert {(row["level"], row["status"]) for row in rows} == {("model", "skipped"), ("ffn", "ok")}
    assert all("transformers" in row["reason"] for row in rows if row["level"] == "model")


def test_harness_imports_without_transformers() -> None:
    names = " ".join(
        f"harness.{path.stem}," for path in sorted((BENCHMARKS / "harness").glob("*.py")) if path.stem != "__init__"
    )
    code = f"import sys; sys.modules['transformers'] = None; import {names} latency, training, kernels"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_record_runs_every_program_and_then_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str]) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=int("kernels.py" in command[1]))

    monkeypatch.setattr(record.subprocess, "run", pretend)
    monkeypatch.setattr(record, "commit_for_the_record", lambda: "a" * 40)
    monkeypatch.setattr(record, "device_name", lambda device: "Some CPU")
    assert record.main(["--device", "cpu"]) == 1  # one of them failed; the others and the report ran all the same
    programs = ["latency", "training", "sweep", "kernels", "decode"]
    assert [Path(command[1]).stem for command in commands] == [*programs, "report"]
    for command in commands[:-1]:
        place = Path(command[command.index("--json") + 1])
        assert place.parent.parent == BENCHMARKS / "results"
        assert place.stem == Path(command[1]).stem
        parser = common_parser("x", program=place.stem)
        setting = settle(parser.parse_args(command[2:]), cpu=latency.CPU, cuda=latency.CUDA)
        assert setting.samples >= 20  # or the report would refuse them
        assert setting.seconds is None  # nothing is left out


def test_the_record_needs_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "first_line", lambda command: None)
    monkeypatch.delenv("MEMVP_COMMIT", raising=False)
    with pytest.raises(SystemExit, match="MEMVP_COMMIT"):
        record.main(["--device", "cpu"])
