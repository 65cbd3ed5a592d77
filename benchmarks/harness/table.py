"""Tables that people can read: aligned for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown", "number", "text"]


def text(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """The rows as an aligned table; words to the left, figures to the right.

    Args:
        rows: anything with the columns' keys; a missing or None value shows as "–".
        columns: key → heading, in order.
    """
    cells, right = _cells(rows, columns)
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(_pad(cell, width, r) for cell, width, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """The rows as a Markdown table."""
    cells, right = _cells(rows, columns)
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("---:" if r else "---" for r in right) + "|")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not use one."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 2 - _exponent(value))
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def _exponent(value: float) -> int:
    return int(f"{value:.2e}".split("e")[1])


def _cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> tuple[list[list[str]], list[bool]]:
    body = [[_cell(row.get(key)) for key in columns] for row in rows]
    right = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in columns]
    return [list(columns.values()), *body], right


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    return str(value)


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)
