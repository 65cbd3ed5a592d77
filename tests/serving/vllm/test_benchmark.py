"""benchmarks/serving.py runs: an engine of each kind, its turns, a file and a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.serving.vllm.engine import ROOT


def test_quick(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/serving.py", "--quick", "--quiet", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads((tmp_path / "serving.json").read_text())
    assert {"commit", "device", "torch", "vllm", "workload"} <= set(document["environment"])
    rows = {row["variant"]: row for row in document["rows"]}
    # 16 visual tokens, 64 of text and 32 of the answer in blocks of 32.
    assert {variant: row["kv_blocks"] for variant, row in rows.items()} == {"prompt": 4, "memory": 3, "text": 3}
    assert rows["prompt"]["concurrent"] <= rows["memory"]["concurrent"] <= 8
    assert all(row[name] > 0 for row in rows.values() for name in ("requests_per_s", "first_token_ms", "per_token_ms"))
    assert "requests/s" in done.stdout and (tmp_path / "plots" / "serving.png").is_file()
