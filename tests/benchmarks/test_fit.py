"""The fit: rates that made the times are found again from them, noise is said to be left, and a CPU's rows move nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import fit
import pytest

pytest.importorskip("triton")
from harness.fit import fitted, observations
from harness.results import Row

from memvp_kernels.backends.triton import roads
from memvp_kernels.backends.triton.rates import RATES, Rates

TRUE = RATES._replace(wgmma=0.83, library=0.97, elementwise=0.81, gluon=0.93, extension=0.88)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def document(rates: Rates, noise: float = 0.0, device_type: str = "cuda") -> dict[str, Any]:
    """What kernels.py would have written had the model been right with these rates."""
    about = json.loads(next(RESULTS.glob("*cpu*/kernels.json")).read_text())["environment"]
    about |= {"device": "a GPU", "device_type": "cuda", "capability": "9.0", "multiprocessors": 132}
    rows = [
        Row(
            f"kernel {step} {batch}×512", variant, "bfloat16", phase=f"kernel {step}", preset="llama-7b", layers=1, level="kernel",
            sequences=batch, text_length=512, visual_tokens=256, samples=20, timing="graph", error=0.0, error_allowed=1e-3,
            median_ms=1.0, p20_ms=1.0, p80_ms=1.0,
        )
        for batch in (1, 16) for step in roads.STEPS for variant in ("triton", "library", "gluon", "wgmma")
    ]  # fmt: skip
    made = {"environment": about, "rows": [dataclasses.asdict(row) for row in rows]}
    for row, o in zip(made["rows"], observations(made), strict=True):
        row["median_ms"] = row["p20_ms"] = row["p80_ms"] = (
            1e3 * o.predicted(rates) * math.exp(noise if row["sequences"] == 1 else -noise)
        )
    about["device_type"] = device_type
    return made


def test_the_rates_behind_the_times_are_found() -> None:
    found = fitted(observations(document(TRUE)))
    for name in Rates._fields:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_what_no_row_depends_on_stays() -> None:
    only = [o for o in observations(document(TRUE)) if o.road == "fused"]
    found = fitted(only)
    assert found.wgmma == pytest.approx(TRUE.wgmma, rel=1e-3)
    assert found._replace(wgmma=RATES.wgmma) == RATES


def test_other_rows_are_left_out() -> None:
    made = document(TRUE)
    other = (
        {**made["rows"][0], "phase": "kernel dmemory"},
        {**made["rows"][0], "variant": "matmul"},
        {**made["rows"][0], "median_ms": None},
    )
    assert observations({**made, "rows": [*made["rows"], *other]}) == observations(made)
    assert observations(document(TRUE, device_type="cpu")) == []


def test_the_program_says_how_far_off_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(document(TRUE, noise=0.05)))
    assert fit.main([str(file)]) == 0
    printed = capsys.readouterr().out
    before, after = (float(found) for found in re.findall(r"off by ([\d.]+)%", printed))
    assert 4.5 < after < 5.1 < before
    assert "library: float = 0.9" in printed
    assert "was 1.03" in printed


def test_without_a_gpu_nothing_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(document(TRUE, device_type="cpu")))
    assert fit.main([str(file)]) == 1
    assert "assumptions" in capsys.readouterr().out
