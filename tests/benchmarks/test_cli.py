"""What the options fall back to, and the order in which sizes run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.cli import Setting, common_parser, settle

CPU = {"batch": (4,), "text_length": (64,), "visual_tokens": (256, 64)}
CUDA = {"batch": (16, 1, 64), "text_length": (64, 512), "visual_tokens": (256, 576)}


def setting(*options: str) -> Setting:
    return settle(common_parser("x", program="latency").parse_args(["--device", "cpu", *options]), cpu=CPU, cuda=CUDA)


def test_a_cpu_without_arguments() -> None:
    found = setting()
    assert found.preset_name == "tiny"
    assert found.dtype == torch.float32
    assert found.element == 4
    assert found.layers == 4
    assert found.samples == 20
    assert not found.compiled
    assert found.seconds == 60  # and so within 90 on slow machines too
    assert str(found.json) == "out/latency.json"


def test_what_was_asked_for_has_no_time_limit_of_its_own() -> None:
    for options in (("--quick",), ("--preset", "tiny"), ("--batch", "2"), ("--layers", "1")):
        assert setting(*options).seconds is None
    assert setting("--seconds", "5").seconds == 5
    assert setting("--json", "none", "--plot", "none").json is None


def test_sizes_begin_with_the_first_of_each_and_change_one_at_a_time() -> None:
    found = setting("--batch", "4", "1", "--text-length", "64", "16", "--visual-tokens", "256", "64").sizes()
    assert len(found) == 8
    assert found[0] == (4, 64, 256)
    assert set(found[1:4]) == {(1, 64, 256), (4, 16, 256), (4, 64, 64)}
    assert found[-1] == (1, 16, 64)


def test_compiled_forms_run_at_the_first_size_alone_on_a_cpu() -> None:
    found = setting("--compile", "--text-length", "64", "16")
    first, *others = found.sizes()
    assert found.at(first, level="model").compiled
    assert not found.at(first, level="ffn").compiled
    assert not any(found.at(size, level="model").compiled for size in others)


def test_a_selection_keeps_the_baseline() -> None:
    found = setting("--variants", "plain-torch")
    assert [name for name in ("prompt", "plain-torch", "text") if found.wants(name)] == ["prompt", "plain-torch"]
    assert setting().wants("anything")


@pytest.mark.parametrize("options", [("--batch", "0"), ("--preset", "llama-8b"), ("--compile", "--no-compile")])
def test_nonsense_is_refused(options: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        setting(*options)
    assert "error" in capsys.readouterr().err
