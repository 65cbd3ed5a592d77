"""What benchmarks/serving.py makes of its engines' answers; that it runs is tested beside vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

serving = pytest.importorskip("serving", reason="needs the `benchmarks` extra: pip install memvp_kernels[benchmarks]")

_TIMES = {
    "prompt": (2.0, 4, 40.0, 8.0),
    "memory": (5.0, 14, 10.0, 10.0),
    "text": (6.0, 14, 8.0, 8.0),
}


def test_rows_report_and_picture(tmp_path: Path) -> None:
    asked = serving.parse(["--turns", "3"])
    names = ("requests_per_s", "concurrent", "first_token_ms", "per_token_ms")
    # The machine slows down from turn to turn, which no ratio shows.
    turns = {
        variant: [dict(zip(names, (a / slow, n, b * slow, c * slow), strict=True)) for slow in (1, 2, 3)]
        for variant, (a, n, b, c) in _TIMES.items()
    }
    rows = serving.summary(turns, 256, asked)
    prompt, memory, _ = rows
    assert (prompt["kv_blocks"], memory["kv_blocks"], memory["concurrent"]) == (11, 3, 14)
    assert [memory[f"{name}_ratio"] for name in serving.MEASURES] == pytest.approx([2.5, 4, 0.8])
    assert memory["requests_per_s"] == 2.5 and memory["first_token_ms"] == 20
    assert serving.section(tmp_path) == []
    workload = {
        "preset": "tiny",
        "dtype": "float32",
        "room": 4,
        "requests": 32,
        "text": 64,
        "output": 32,
        "turns": 3,
        "eager": True,
    }
    here = {
        "program": "serving", "device": "a CPU", "torch": "2.13.0", "commit": "a" * 40, "date": "today", "device_type": "cpu", "vllm": "vllm 0.32.0",
        "workload": workload,
    }  # fmt: skip
    (tmp_path / "serving.json").write_text(json.dumps({"environment": here, "rows": rows}))
    heading, text, table = serving.section(tmp_path)
    assert "equal KV memory" in heading and "vllm 0.32.0" in text
    assert [cell.strip() for cell in table.splitlines()[3].split("|")[1:-1]] == [
        "256", "memory", "3", "14", "2.50", "2.50", "20.0", "4.00", "20.0", "0.800",
    ]  # fmt: skip
    serving.draw(tmp_path)
    assert (tmp_path / "plots" / "serving.png").stat().st_size > 1000


def test_every_engine_has_the_same_kv_memory() -> None:
    asked = serving.parse([])
    assert serving.kv_blocks(256, asked) == 1 + asked.room * 11
    with pytest.raises(SystemExit):
        serving.parse(["--visual", "50"])
