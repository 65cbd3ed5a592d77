"""The report is generated from the files, says what they say, and nothing more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

report = pytest.importorskip("report", reason="needs the `benchmarks` extra: pip install memvp_kernels[benchmarks]")
from rows import Row  # noqa: E402

from tests.benchmarks.conftest import BENCHMARKS  # noqa: E402

PREFILL = {"prompt": 50.0, "text": 10.0, "official-eager": 12.0, "MemVPModel": 11.0}


def rows(
    case: str, phase: str, medians: dict[str, float], *, level: str = "model", visual_tokens: int = 256
) -> list[dict[str, Any]]:
    found = []
    for variant, median in medians.items():
        row = Row(
            case=case, variant=variant, dtype="bfloat16", level=level, phase=phase, preset="llama-7b", layers=32, sequences=16,
            text_length=64, visual_tokens=visual_tokens, memory_per_image_bytes=10**6, cache_per_image_bytes=0, timing="cuda-graph",
            peak_memory_bytes=10**9, sm_clock_mhz=1800.0, flops=10**12, bytes=10**9, roofline_ms=median / 2,
        )  # fmt: skip
        row.judge(1e-3, 2e-3)
        row.take(median, median * 0.99, median * 1.01, samples=21)
        row.speedup_vs_prompt = medians["prompt"] / median if "prompt" in medians else None
        found.append(dataclasses.asdict(row))
    return found


def write(folder: Path, program: str, found: list[dict[str, Any]], **changes: Any) -> None:
    environment = {
        "program": program, "date": "today", "device": "Imaginary GPU", "device_type": "cuda", "torch": "2.11.0", "commit": "a" * 40,
        "peaks": {"matmul_tflops": 100.0, "copy_gbs": 1000.0, "stream_gbs": 1100.0},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{program}.json").write_text(json.dumps({"environment": environment | changes, "rows": found}))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "imaginary-gpu"
    first = rows("model, first token 16×64, image 256", "prefill", PREFILL)
    lost = rows("ffn, decode 16×1", "decode", {"prompt": 1.0, "official-eager": 1.2, "factored-auto": 1.5}, level="ffn")
    lost[1] |= {"note": "no CUDA graph: it synchronizes"}
    broken = {
        **lost[0],
        "variant": "liger",
        "status": "failed",
        "reason": "OutOfMemoryError: no room",
        "median_ms": None,
    }
    write(folder, "latency", [*first, *lost, broken])
    write(
        folder,
        "training",
        rows("model, training step 16×64, image 256", "training", {**PREFILL, "MemVPModel": 12.5}),
        commit="b" * 40,
    )
    sweep = [rows(f"4 layers, first token, image {n}", "prefill", PREFILL, visual_tokens=n) for n in (64, 256)]
    write(folder, "latency-sweep", [row for case in sweep for row in case])
    return tmp_path / "results"


def test_where_ours_loses_is_said(results: Path) -> None:
    (machine,) = report.machines(results)
    lost = {
        line["case"]: (line["faster"], line["ratio"]) for line in report.losses(machine.rows("latency", "training"))
    }
    assert lost["ffn, decode 16×1"] == ("official-eager", pytest.approx(1.25))
    assert lost["model, training step 16×64, image 256"] == ("official-eager", pytest.approx(12.5 / 12))
    assert "model, first token 16×64, image 256" not in lost


def test_the_baseline_is_the_faster_of_eager_and_compiled(tmp_path: Path) -> None:
    medians = {
        "prompt": 50.0,
        "prompt-compile": 40.0,
        "text": 9.0,
        "text-compile": 8.0,
        "factored-auto": 10.0,
        "MemVPModel": 20.0,
    }
    write(tmp_path / "gpu", "latency", rows("model, per token 16×1, image 256", "decode", medians))
    (line,) = report.headline(report.machines(tmp_path)[0])
    assert [line[name] for name in ("ours", "prompt", "text", "ratio")] == [20.0, 40.0, 8.0, 2.0]
    assert line["official"] is None


@pytest.mark.parametrize(
    ("environment", "row", "complaint"),
    [
        ({"commit": "unknown"}, {}, "outside a checkout"),
        ({"triton_interpreted": True}, {}, "interpreter"),
        ({}, {"samples": 3}, "fewer than 20 samples"),
        ({}, {"error": 1.0}, "over the allowed"),
        ({}, {"status": "wrong"}, "a time goes with status ok"),
        ({}, {"median_ms": None}, "a time goes with status ok"),
    ],
)
def test_what_no_report_may_quote_is_refused(environment: Any, row: Any, complaint: str, tmp_path: Path) -> None:
    first, *others = rows("case", "prefill", PREFILL)
    write(tmp_path / "gpu", "latency", [first | row, *others], **environment)
    with pytest.raises(ValueError, match=complaint):
        report.machines(tmp_path)


def test_uncommitted_changes_and_the_lack_of_a_gpu_are_said(tmp_path: Path) -> None:
    write(tmp_path / "cpu", "latency", rows("case", "prefill", PREFILL), device_type="cpu", commit="c" * 40 + "-dirty")
    found = report.machines(tmp_path)
    assert "No GPU results" in report.report(found)
    assert "Measured with uncommitted changes" in report.report(found)
    assert "No GPU has been measured yet" in report.figures(found)
    assert "Nothing has been measured yet" in report.figures([])


def test_what_is_committed_is_what_the_files_give() -> None:
    assert report.main(["--check", "--readme", str(BENCHMARKS / "no-readme")]) == 0
