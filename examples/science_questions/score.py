"""The official score table of ScienceQA: accuracy by subject, by what comes with the question, by grade, and over all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tabulate import tabulate

from science_questions.data import Problem

__all__ = ["CATEGORIES", "scores", "table"]


def _grade(problem: Problem) -> int:
    return int(problem.grade.removeprefix("grade"))


CATEGORIES: dict[str, Callable[[Problem], bool]] = {
    "NAT": lambda p: p.subject == "natural science",
    "SOC": lambda p: p.subject == "social science",
    "LAN": lambda p: p.subject == "language science",
    "TXT": lambda p: bool(p.hint),
    "IMG": lambda p: p.image is not None,
    "NO": lambda p: not p.hint and p.image is None,
    "G1-6": lambda p: 1 <= _grade(p) <= 6,
    "G7-12": lambda p: 7 <= _grade(p) <= 12,
    "Avg": lambda p: True,
}


def scores(problems: Sequence[Problem], predictions: Mapping[str, int]) -> dict[str, float | None]:
    """Per cent right in every category; None for a category without problems.

    Args:
        problems: what was asked.
        predictions: problem id → index of the chosen answer, -1 for none.

    Raises:
        ValueError: a problem without prediction; the table is of the whole split or of nothing.
    """
    missing = [problem.id for problem in problems if problem.id not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} of {len(problems)} problems have no prediction, the first is {missing[0]}")
    result: dict[str, float | None] = {}
    for name, belongs in CATEGORIES.items():
        right = [predictions[problem.id] == problem.answer for problem in problems if belongs(problem)]
        result[name] = 100 * sum(right) / len(right) if right else None
    return result


def table(result: Mapping[str, float | None]) -> str:
    """Names and figures."""
    return tabulate([list(result.values())], list(result), floatfmt=".2f", missingval="-")
