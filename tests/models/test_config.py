"""MemVPConfig: a JSON file and back, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memvp_kernels import MemVPConfig


def test_defaults_are_the_papers() -> None:
    assert MemVPConfig().to_dict() == {
        "vision_dim": 1024,
        "projector_dim": 128,
        "num_slots": 320,
        "feature_scale": 0.01,
        "memory_scale": 0.1,
        "dropout": 0.1,
        "shared_positions": True,
        "layers": None,
        "pooled_grids": [],
        "class_token": False,
        "image_prefix": [],
        "text_prefix": [],
        "visual_activation": None,
        "visual_map": None,
        "visual_drop": 0.0,
    }


@pytest.mark.parametrize(
    "config",
    [
        MemVPConfig(vision_dim=7, feature_scale=0.3, memory_scale=0.2, shared_positions=False),
        MemVPConfig(memory_scale=(0.2, 0.3), layers=[3, 1]),  # type: ignore[arg-type]
        MemVPConfig.adem_vl(pooled_grids=(9, 4), image_prefix=(5, 6)),
    ],
)
def test_json_round_trip(config: MemVPConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "c.json")
    assert MemVPConfig.load(tmp_path / "c.json") == config
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["layers"] == (None if config.layers is None else [1, 3])
    assert written["pooled_grids"] == list(config.pooled_grids)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_slots": 0}, ValueError, "num_slots must be at least 1, got 0"),
        ({"num_slots": 3.0}, TypeError, r"num_slots must be an int, got 3\.0"),
        ({"vision_dim": True}, TypeError, "vision_dim must be an int"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"memory_scale": "s"}, TypeError, "memory_scale must be a float, got 's'"),
        ({"memory_scale": (0.1, float("inf"))}, ValueError, "memory_scale must be finite, got inf"),
        ({"memory_scale": ()}, ValueError, "memory_scale is empty"),
        ({"feature_scale": float("nan")}, ValueError, "feature_scale must be finite"),
        ({"shared_positions": 1}, TypeError, "shared_positions must be a bool"),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": [0, 0]}, ValueError, "names an index twice"),
        ({"layers": [-1]}, ValueError, "counts from 0, got -1"),
        ({"layers": "all"}, TypeError, "sequence of ints, got 'all'"),
    ],
)
def test_errors(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MemVPConfig(**values)


def test_unknown_entries_are_named(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"num_slot": 3}')
    with pytest.raises(ValueError, match=r"unknown MemVPConfig entries \['num_slot'\]; known are \['vision_dim'"):
        MemVPConfig.load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        MemVPConfig.load(tmp_path / "c.json")
