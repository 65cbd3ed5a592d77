"""Pictures of result rows, as PNG. Without matplotlib nothing is drawn, and the reader is told so."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_floor", "plot_memory", "plot_speedups", "plot_sweep"]

Document = Mapping[str, Any]

_OURS = "#1b7837"
_TEXT = "#4393c3"
_PEER = "#9e9ac8"
_PROMPT = "#b2182b"
_MARKERS = "os^vDPX*<>"


def colour(variant: str) -> str:
    """Green for ours, blue for text only, red for the prompt-length form, violet for the peers."""
    if variant.startswith("text"):
        return _TEXT
    if variant == "MemVPModel":
        return _OURS
    if variant.startswith("prompt"):
        return _PROMPT
    ours = variant.split("-")[0] in ("plain", "factored", "positions")
    return _OURS if ours and not variant.endswith(("-eager", "-compile", "-joined")) else _PEER


def plot_speedups(documents: Sequence[Document], path: Path) -> bool:
    """One panel per case, one bar per variant: median time, p20 to p80 as whisker, speed-up over the prompt-length form as label.

    Returns:
        Whether the picture was drawn.
    """
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        for row in document["rows"]:
            if row["status"] == "ok":
                cases.setdefault(row["case"], []).append(row)
    plt = _matplotlib()
    if plt is None or not cases:
        return False
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(len(rows) for rows in cases.values())
    figure, grid = plt.subplots(lines, columns, figsize=(7 * columns, (0.9 + 0.27 * tallest) * lines), squeeze=False)
    for axis in grid.flat[len(cases) :]:
        axis.axis("off")
    for axis, (case, rows) in zip(grid.flat, cases.items(), strict=False):
        medians = [row["median_ms"] for row in rows]
        whiskers = [
            [row["median_ms"] - row["p20_ms"] for row in rows],
            [row["p80_ms"] - row["median_ms"] for row in rows],
        ]
        names = [row["variant"] for row in rows]
        axis.barh(names, medians, color=[colour(name) for name in names], xerr=whiskers, error_kw={"lw": 0.8})
        for place, row in enumerate(rows):
            if row["speedup_vs_prompt"] is not None:
                label = f"  {row['speedup_vs_prompt']:.2f}×"
                axis.annotate(label, (row["p80_ms"], place), va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.18 * max(row["p80_ms"] for row in rows))
        axis.set_title(case, fontsize=9, loc="left")
        axis.set_xlabel("ms (label: speed-up over visual tokens in the prompt)", fontsize=8)
        axis.tick_params(labelsize=8)
    _save(plt, figure, path, documents)
    return True


def plot_sweep(documents: Sequence[Document], path: Path, *, against: str, label: str) -> bool:
    """Speed-up over the prompt-length form against a size, one panel per phase, one line per variant; 1 is a draw.

    The other sizes are those of each phase's first row.

    Args:
        documents: result files.
        path: to write.
        against: the row's field on the horizontal axis.
        label: of that axis.
    """
    series: dict[str, dict[str, dict[int, float]]] = {}
    fixed: dict[str, list[int]] = {}
    for row in _timed(documents):
        if row.get("level") == "model" and row["speedup_vs_prompt"] is not None and row["variant"] != "prompt":
            others = [row[size] for size in ("sequences", "text_length", "visual_tokens") if size != against]
            if fixed.setdefault(row["phase"], others) == others:
                series.setdefault(row["phase"], {}).setdefault(row["variant"], {})[row[against]] = row[
                    "speedup_vs_prompt"
                ]
    series = {phase: lines for phase, lines in series.items() if any(len(points) > 1 for points in lines.values())}
    plt = _matplotlib()
    if plt is None or not series:
        return False
    figure, axes = plt.subplots(1, len(series), figsize=(5.5 * len(series), 4), squeeze=False)
    for axis, (phase, lines) in zip(axes.flat, series.items(), strict=True):
        for place, (variant, points) in enumerate(lines.items()):
            sizes = sorted(points)
            ratios = [points[size] for size in sizes]
            marker = _MARKERS[place % len(_MARKERS)]
            axis.plot(sizes, ratios, marker=marker, color=colour(variant), label=variant, lw=1.2, ms=5, alpha=0.85)
        axis.axhline(1, color=_PROMPT, lw=1, ls="--")
        axis.set_title(phase, loc="left", fontsize=10)
        axis.set_xlabel(label)
        axis.set_ylabel("× faster than visual tokens in the prompt")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    _save(plt, figure, path, documents)
    return True


def plot_floor(documents: Sequence[Document], path: Path) -> bool:
    """Share of the floor that each variant reaches, by shape of the FFN."""
    rows = [row for row in _timed(documents) if row.get("level") in ("ffn", "kernel") and row.get("percent_of_floor")]
    plt = _matplotlib()
    if plt is None or not rows:
        return False
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.5 * len(cases)))
    for place, name in enumerate(names):
        points = [(row["percent_of_floor"], cases.index(row["case"])) for row in rows if row["variant"] == name]
        marker = _MARKERS[place % len(_MARKERS)]
        axis.scatter(*zip(*points, strict=True), color=colour(name), marker=marker, label=name, s=28, alpha=0.85)
    axis.axvline(100, color="black", lw=0.8)
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the floor of its own form (100: nothing left to gain)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(plt, figure, path, documents)
    return True


def plot_memory(documents: Sequence[Document], path: Path) -> bool:
    """Bytes that an image occupies while its conversation lasts, by the way it is kept."""
    kept: dict[str, dict[str, float]] = {}
    for row in _timed(documents):
        size = (row.get("memory_per_image_bytes") or 0) + (row.get("cache_per_image_bytes") or 0)
        if row.get("level") == "model" and size and not row["variant"].endswith("compile"):
            kept.setdefault(f"{row['preset']}, {row['visual_tokens']} visual tokens", {})[row["variant"]] = size / 1e6
    plt = _matplotlib()
    if plt is None or not kept:
        return False
    figure, axes = plt.subplots(1, len(kept), figsize=(5.5 * len(kept), 3.6), squeeze=False)
    for axis, (title, sizes) in zip(axes.flat, kept.items(), strict=True):
        names = sorted(sizes, key=lambda name: sizes[name])
        bars = axis.barh(names, [sizes[name] for name in names], color=[colour(name) for name in names], log=True)
        axis.bar_label(bars, fmt="%.3g MB", fontsize=7, padding=2)
        axis.margins(x=0.25)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("MB per image (log)")
        axis.tick_params(labelsize=8)
    _save(plt, figure, path, documents)
    return True


def _timed(documents: Sequence[Document]) -> list[Mapping[str, Any]]:
    return [row for document in documents for row in document["rows"] if row["status"] == "ok"]


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no picture (pip install matplotlib)", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(plt: Any, figure: Any, path: Path, documents: Sequence[Document]) -> None:
    """Every picture names its machine and commit."""
    environment = documents[0]["environment"]
    origin = f"{environment['device']} · torch {environment['torch']} · commit {environment['commit'][:12]}"
    figure.text(0.995, 0.002, origin, ha="right", va="bottom", fontsize=7, color="0.4")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file's metadata: the same rows give the same bytes.
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
