"""ScienceQA in its official layout: problems.json, pid_splits.json, captions.json, images/<split>/<id>/image.png."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Problem", "load_split", "read_image"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, not CLIP's: what the official code trains with


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        id: its key in problems.json.
        question: the question.
        choices: what may be answered, in order.
        answer: index of the right choice.
        hint: text that comes with it; may be empty.
        caption: what its image shows, in words; empty without captions.
        subject: "natural science", "social science" or "language science".
        grade: "grade1" to "grade12".
        image: path of its image; None: it has none.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    caption: str
    subject: str
    grade: str
    image: Path | None


def load_split(root: Path, split: str, *, captions: bool) -> list[Problem]:
    """The problems of one split, in the order of pid_splits.json.

    Args:
        root: the folder with the JSON files and ``images``.
        split: "train", "val", "test", "minival", "minitest" or whatever pid_splits.json has.
        captions: read captions.json and put them into the problems.

    Raises:
        FileNotFoundError: one of the files is missing.
        KeyError: no such split, or a split that names an unknown problem.
    """
    splits = _read(root / "pid_splits.json")
    if split not in splits:
        raise KeyError(f"no split {split!r} in {root / 'pid_splits.json'}; it has {sorted(splits)}")
    problems = _read(root / "problems.json")
    texts = _read(root / "captions.json")["captions"] if captions else {}
    return [_problem(root, key, problems[key], texts.get(key, "")) for key in map(str, splits[split])]


def read_image(path: Path, size: int) -> Tensor:
    """(3, size, size): bicubic, squeezed to a square without cropping, normalized, as the official code does."""
    with Image.open(path) as image:
        square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(size, size, 3).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def _problem(root: Path, key: str, entry: dict[str, Any], caption: str) -> Problem:
    image = root / "images" / entry["split"] / key / "image.png" if entry["image"] else None
    return Problem(
        id=key,
        question=entry["question"],
        choices=tuple(entry["choices"]),
        answer=entry["answer"],
        hint=entry["hint"],
        caption=caption,
        subject=entry["subject"],
        grade=entry["grade"],
        image=image,
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
