"""benchmarks/decode.py: whole with the smallest preset, and its baseline exact."""

from __future__ import annotations

from pathlib import Path

import decode
import pytest
import torch
from harness.cli import common_parser, settle
from harness.decode_case import candidates, factored_joined, join
from harness.operands import Parts, Weights
from harness.results import load

from memvp_kernels import reference

QUICK = ["--device", "cpu", "--quick", "--quiet", "--samples", "2", "--plot", "none"]
TEXT = {"text", "text-torch"}
MEMORY = {"text", "official-eager", "formed-eager", "factored-joined", "factored-torch"}


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert decode.main([*QUICK, "--json", str(file)]) == 0
    rows = load(file)["rows"]
    cases = {f"decode, 2 tokens, {images}": {row["variant"] for row in rows if images in row["case"]} for images in
             ("an image each", "no image", "one image for all")}  # fmt: skip
    assert list(cases.values()) == [MEMORY, TEXT, MEMORY]
    assert {row["case"] for row in rows} == set(cases)
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["gbs"] > 0 and row["speedup_vs_text"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "% of stream" in printed
    assert "median µs" in printed


def test_one_token_is_not_measured_twice() -> None:
    setting = settle(common_parser("", program="decode").parse_args([*QUICK, "--batch", "1"]), cpu={}, cuda={})
    names = [job.template.case for job in decode.jobs(setting, ["none", "one", "each"])]
    assert names == ["decode, 1 token, no image", "decode, 1 token, an image each"]
    assert [job.template.case for job in decode.jobs(setting, ["one"])] == ["decode, 1 token, one image for all"]


def test_an_image_is_read_once_by_all_its_tokens() -> None:
    setting = settle(common_parser("", program="decode").parse_args([*QUICK, "--batch", "8"]), cpu={}, cuda={})

    def count(images: str) -> int:
        found = {c.name: c for c in candidates(setting, tokens=8, images=images, visual_tokens=16)}
        return found["factored-joined" if images != "none" else "text"].count.bytes

    core = setting.preset.slots * setting.preset.rank * setting.element
    assert count("each") - count("one") == 7 * core
    assert count("one") > count("none")


def test_the_baseline_is_exact() -> None:
    d, f, m, r = 12, 20, 5, 4
    weights = Weights(*(torch.randn(f, d, dtype=torch.float64) for _ in range(3)))
    parts = Parts(
        core=torch.randn(3, m, r, dtype=torch.float64),
        basis=torch.randn(r, d, dtype=torch.float64),
        key_position=torch.randn(m, d, dtype=torch.float64),
        value_position=torch.randn(m, d, dtype=torch.float64),
        scale=0.3,
    )
    x = torch.randn(3, 2, d, dtype=torch.float64)
    joined = join(parts)
    exact = reference.ffn(
        x, weights.key, weights.value, parts.core, parts.core, gate=weights.gate, visual_basis=parts.basis,
        key_position=parts.key_position, value_position=parts.value_position, visual_scale=parts.scale,
    )  # fmt: skip
    torch.testing.assert_close(factored_joined(x, weights, joined, 0.0), exact)
