"""Each program once, whole, with the smallest preset: its table, its file, its exit status, its options."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import decode
import kernels
import latency
import pytest
import torch
import training

from tests.benchmarks.conftest import BENCHMARKS

PLAIN_PYTORCH = {"prompt", "text", "official-eager", "plain-eager", "factored-eager", "concatenated"}
VARIANTS = {*PLAIN_PYTORCH, "liger", "plain-torch", "factored-torch"}
FIELDS = {"case", "variant", "median_ms", "p20_ms", "p80_ms", "speedup_vs_prompt"}


def options(folder: Path, *more: str, samples: int = 2) -> list[str]:
    return ["--device", "cpu", "--quick", "--quiet", "--samples", str(samples), "--out", str(folder), *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    assert {"commit", "device", "torch", "peaks", "date"} <= set(document["environment"])
    assert all(set(row) >= FIELDS for row in document["rows"])
    return list(document["rows"])


def statuses(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {row["variant"]: {other["status"] for other in rows if other["variant"] == row["variant"]} for row in rows}


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(options(tmp_path)) == 0
    rows = rows_of(tmp_path / "latency.json")
    found = statuses(rows)
    assert set(found) == {*VARIANTS, "MemVPModel"}
    assert {name for name, status in found.items() if status != {"ok"}} == {"liger"}
    assert {(r["level"], r["phase"]) for r in rows} == {(a, b) for a in ("ffn", "model") for b in ("prefill", "decode")}
    assert {r["phase"] for r in rows if r["variant"] == "MemVPModel"} == {"prefill", "decode"}
    assert all(r["cache_per_image_bytes"] > 0 for r in rows if r["variant"] == "prompt" and r["level"] == "model")
    assert all(r["speedup_vs_prompt"] == 1 for r in rows if r["variant"] == "prompt")
    for row in rows:
        if row["status"] == "ok":
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert min(row["first_call_s"], row["peak_memory_bytes"], row["roofline_ms"], row["tflops"]) > 0
            assert row["error"] <= row["error_allowed"]
    printed = capsys.readouterr().out
    assert "model, first token 2×8, image 16" in printed
    assert "× prompt" in printed
    assert (tmp_path / "latency.png").stat().st_size > 1000


@pytest.mark.parametrize("switches", [(), ("--checkpointing", "--recompute", "--dtype", "bfloat16")])
def test_training(tmp_path: Path, switches: tuple[str, ...]) -> None:
    assert training.main(options(tmp_path, *switches)) == 0
    (path,) = tmp_path.glob("*.json")  # a file of its own for each set of switches
    assert path.stem == ("training-checkpointing-recompute" if switches else "training")
    rows = rows_of(path)
    found = statuses(rows)
    assert set(found) == {*VARIANTS, "MemVPModel"} - ({"concatenated"} if switches else set())  # an FFN's alone
    assert {name for name, status in found.items() if status != {"ok"}} == {"liger"}
    cases = {row["case"] for row in rows}
    assert any(case.startswith("ffn") for case in cases) is not bool(switches)  # checkpointing wraps layers
    assert all(("checkpointing, recompute" in case) is bool(switches) for case in cases)


@pytest.mark.parametrize("program", [latency, training])
def test_a_sweep_varies_one_size_at_a_time(program: Any, tmp_path: Path) -> None:
    sizes = ("--text-length", "8", "4", "--visual-tokens", "16", "8", "--layers", "1")
    assert program.main(options(tmp_path, "--sweep", *sizes)) == 0
    rows = rows_of(tmp_path / f"{program.__name__}-sweep.json")
    assert set(statuses(rows)) == {"prompt", "text", "official-eager", "factored-torch", "MemVPModel"}
    assert {(row["text_length"], row["visual_tokens"]) for row in rows} == {(8, 16), (4, 16), (8, 8)}
    assert {row["level"] for row in rows} == {"model"}
    assert all(row["case"].startswith("1 layers, ") for row in rows)
    assert (tmp_path / f"{program.__name__}-sweep.png").stat().st_size > 1000


def test_a_quantized_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert training.main(options(tmp_path, "--quantized", "--preset", "tiny", "--layers", "1", samples=1)) == 0
    rows = {row["variant"]: row for row in rows_of(tmp_path / "training-quantized.json")}
    assert {name: row["status"] for name, row in rows.items()} == {"MemVPModel": "ok", "MemVPModel-nf4": "ok"}
    assert rows["MemVPModel-nf4"]["peak_memory_bytes"] < rows["MemVPModel"]["peak_memory_bytes"]


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(options(tmp_path)) == 0
    rows = rows_of(tmp_path / "decode.json")
    text, memory = (
        {"text", "text-torch"},
        {"text", "official-eager", "plain-eager", "factored-joined", "factored-torch"},
    )
    cases = {row["case"]: {r["variant"] for r in rows if r["case"] == row["case"]} for row in rows}
    names = ("an image each", "no image", "one image for all")
    assert cases == {f"decode, 2 tokens, {name}": own for name, own in zip(names, (memory, text, memory), strict=True)}
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["gbs"] > 0 and row["speedup_vs_text"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "% of read" in printed
    assert "median µs" in printed


def test_kernels(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton"):
        from tests.triton.interpreter import repair

        repair()
    assert kernels.main(options(tmp_path)) == 0
    rows = rows_of(tmp_path / "kernels.json")
    found = statuses(rows)
    assert found["matmul"] == found["factored-torch"] == {"ok"}
    assert found["triton"] <= {"skipped", "ok"}  # "ok" where the interpreter runs them
    assert found["sort"] == found["kthvalue"] == found["probe"] == found["ffn-and-image"] == {"ok"}
    names = ("hidden", "output", "dhidden", "dinput", "dmemory", "core", "dcore", "drop")
    of_kernels = [f"kernel {name}" for name in names]
    assert {row["phase"] for row in rows} == {"training forward", "training backward", *of_kernels, "MemVR"}


def test_host_overhead() -> None:
    """`make bench` itself takes its time; that its functions run is a matter of seconds."""
    pytest.importorskip("pytest_benchmark")
    # As `make bench` has it: kernels are compiled, not interpreted, though none is launched.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pytest_once = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable")
    command = [sys.executable, *pytest_once, "benchmarks/host_overhead.py"]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_time_limit_leaves_cases_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(options(tmp_path, "--seconds", "0", samples=1)) == 0
    printed = capsys.readouterr().out
    assert "not begun, because --seconds were over:\n  model, first token 2×8, image 16\n" in printed


def test_a_gpu_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit, match="PyTorch sees none"):
        latency.main(["--device", "cuda"])


def test_latency_alone_needs_neither_triton_nor_transformers_nor_what_draws(tmp_path: Path) -> None:
    """Python, torch and numpy are enough for the FFN; the model's rows say what is missing."""
    absent = ("triton", "transformers", "matplotlib", "tabulate", "tqdm", "pandas", "sklearn", "PIL")
    run = "import latency; sys.exit(latency.main(sys.argv[1:]))"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); {run}"
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    command = [sys.executable, "-c", code, *options(tmp_path, "--variants", "plain-torch", samples=1)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plain-torch" in done.stdout
    rows = rows_of(tmp_path / "latency.json")
    assert {(row["level"], row["status"]) for row in rows} == {("model", "skipped"), ("ffn", "ok")}
    assert all("transformers" in row["reason"] for row in rows if row["level"] == "model")
