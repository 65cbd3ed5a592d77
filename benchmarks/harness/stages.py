"""In which order the variants of a run are timed, so that a run that is cut short has what matters most of every case."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from harness.digest import OURS
from harness.measure import Candidate

__all__ = ["STAGES", "anchor", "groups"]

STAGES = 3

#: What their names begin with that are essential to no claim, and so come later on a GPU, where minutes count.
_LATER = (
    "concatenated",
    "factored-eager",
    "factored-torch",
    "factored-triton",
    "liger",
    "plain-",
    "positions-",
    "text-cuda",
    "text-triton",
)


def groups(stage: int, candidates: Sequence[Candidate], device: torch.device) -> list[list[Candidate]]:
    """The variants of a case that a stage times, those of a group interleaved; rows are saved after every group.

    Args:
        stage: 0, what every claim rests on (on a CPU, everything that is not compiled); 1, the rest of that; 2, the torch.compile
            forms one by one, tens of seconds each.
        candidates: of the case.
        device: measured.
    """
    chosen = [candidate for candidate in candidates if _stage(candidate.name, device) == stage]
    if stage == STAGES - 1:
        return [[candidate] for candidate in chosen]
    return [chosen] if chosen else []


def anchor(candidates: Sequence[Candidate], timed: Collection[str]) -> Candidate | None:
    """Ours, where it was timed: re-timed beside what is timed later, because clocks drift and a ratio should not."""
    by_name = {candidate.name: candidate for candidate in candidates}
    return next((by_name[name] for name in OURS if name in by_name and name in timed), None)


def _stage(name: str, device: torch.device) -> int:
    if name.endswith("-compile"):
        return STAGES - 1
    return int(device.type == "cuda" and name.startswith(_LATER))
