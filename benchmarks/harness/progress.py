"""A progress bar where tqdm is installed; without it, one line per step on the error stream."""

from __future__ import annotations

import sys
from types import TracebackType

__all__ = ["Progress"]


class Progress:
    """Counts steps of a known total and shows what is running.

    Args:
        total: steps in all.
        quiet: shows nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total = total
        self._quiet = quiet
        self._done = 0
        self._bar = None
        if not quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, text: str) -> None:
        """Names what runs now."""
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif not self._quiet:
            print(f"[{self._done}/{self._total}] {text}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
