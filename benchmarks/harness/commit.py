"""Which commit a measurement is of. No row is worth anything without it, so a run for the record starts only where it is known."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

__all__ = ["DIRTY", "UNKNOWN_COMMIT", "commit", "commit_for_the_record", "first_line"]

UNKNOWN_COMMIT = "unknown"
DIRTY = "-dirty"
_REPOSITORY = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The checked-out commit, with "-dirty" when tracked files differ from it; where there is no git, what MEMVP_COMMIT says."""
    git = ["git", "-C", str(_REPOSITORY)]
    top = first_line([*git, "rev-parse", "--show-toplevel"])
    head = first_line([*git, "rev-parse", "HEAD"])
    if head is None or top is None or Path(top).resolve() != _REPOSITORY:
        return os.environ.get("MEMVP_COMMIT") or UNKNOWN_COMMIT
    # Results do not count as changes: a run that wrote latency.json may be followed by one that writes training.json.
    results = (":!benchmarks/results", ":!benchmarks/REPORT.md", ":!README.md")
    changed = first_line([*git, "status", "--porcelain", "--untracked-files=no", "--", ".", *results])
    return head + (DIRTY if changed else "")


def commit_for_the_record(said: str | None = None) -> str:
    """The commit that rows will name; what was said holds for this process and those that it starts, where there is no git.

    Args:
        said: of the command line.

    Raises:
        ValueError: nobody knows it, or what was said is none.
    """
    if said is not None:
        os.environ["MEMVP_COMMIT"] = said
    found = commit()
    if found == UNKNOWN_COMMIT:
        raise ValueError(
            "this tree has no git, and rows must name their commit: pass --commit (or set MEMVP_COMMIT) to what "
            "`git describe --always --dirty --abbrev=40` says in the checkout that it was copied from"
        )
    if not re.fullmatch(rf"[0-9a-f]{{7,40}}({DIRTY})?", found):
        raise ValueError(f'commit: wanted 7 to 40 hexadecimal digits, "{DIRTY}" after them or not, got {found!r}')
    return found


def first_line(command: list[str]) -> str | None:
    """The first line that a command prints; None where it fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
