"""Pictures of result rows, as PNG. Without matplotlib nothing is drawn, and the reader is told so."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = Mapping[str, Any]
_Rows = Sequence[Mapping[str, Any]]

_OURS, _TEXT, _PEER, _PROMPT = "#1b7837", "#4393c3", "#9e9ac8", "#b2182b"
_MARKERS = "os^vDPX*<>"


def is_ours(variant: str) -> bool:
    """Whether a variant runs this package: its model, one of its kernels, or its operator with a form of memory by a backend."""
    by_operator = variant.split("-")[0] in ("plain", "factored", "positions")
    return variant in ("MemVPModel", "triton", "cublas", "cuda") or (
        by_operator and not variant.endswith(("-eager", "-compile", "-joined"))
    )


def color(variant: str) -> str:
    """Green for ours, blue for text only, red for the prompt form, violet for the others."""
    if is_ours(variant):
        return _OURS
    return _TEXT if variant.startswith("text") else _PROMPT if variant.startswith("prompt") else _PEER


def plot_program(document: Document, path: Path | None) -> None:
    """The picture that belongs to a program's rows."""
    program = document["environment"]["program"]
    draw = (
        plot_sweep
        if program.endswith("-sweep")
        else plot_roofline
        if program in ("kernels", "decode")
        else plot_serving
        if program == "serving"
        else plot_speedups
    )
    if path is not None:
        draw([document], path)


def plot_speedups(documents: Sequence[Document], path: Path) -> bool:
    """One panel per case, one bar per variant: median time, p20 to p80 as whisker, speedup over the prompt form as label."""
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in _timed(documents):
        cases.setdefault(row["case"], []).append(row)
    plt = _matplotlib()
    if plt is None or not cases:
        return False
    columns = min(2, len(cases))
    tallest = max(len(rows) for rows in cases.values())
    height = (0.9 + 0.27 * tallest) * -(-len(cases) // columns)
    figure, grid = plt.subplots(-(-len(cases) // columns), columns, figsize=(7 * columns, height), squeeze=False)
    for axis in grid.flat[len(cases) :]:
        axis.axis("off")
    for axis, (case, rows) in zip(grid.flat, cases.items(), strict=False):
        medians = [row["median_ms"] for row in rows]
        names = [row["variant"] for row in rows]
        below = [row["median_ms"] - row["p20_ms"] for row in rows]
        above = [row["p80_ms"] - row["median_ms"] for row in rows]
        axis.barh(names, medians, color=[color(name) for name in names], xerr=[below, above], error_kw={"lw": 0.8})
        for place, row in enumerate(rows):
            if row["speedup_vs_prompt"] is not None:
                label = f"  {row['speedup_vs_prompt']:.2f}×"
                axis.annotate(label, (row["p80_ms"], place), va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.18 * max(row["p80_ms"] for row in rows))
        axis.set_title(case, fontsize=9, loc="left")
        axis.set_xlabel("ms (label: speedup over visual tokens in the prompt)", fontsize=8)
        axis.tick_params(labelsize=8)
    _save(plt, figure, path, documents)
    return True


_SIZES = {"visual_tokens": "visual tokens of the image", "text_length": "text tokens"}
_PHASES = {"prefill": "time to first token", "decode": "time per token", "training": "training step"}


def plot_sweep(documents: Sequence[Document], path: Path) -> bool:
    """Speedup over the prompt form against each size that varies, a column per phase; the other sizes are each phase's first row's."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for row in _timed(documents):
        if row["level"] != "model" or row["speedup_vs_prompt"] is None or row["variant"].startswith("prompt"):
            continue
        fixed = first.setdefault(row["phase"], row)
        for size in _SIZES:
            others = [name for name in ("sequences", *_SIZES) if name != size]
            if all(row[name] == fixed[name] for name in others):
                lines = panels.setdefault((size, row["phase"]), {})
                lines.setdefault(row["variant"], {})[row[size]] = row["speedup_vs_prompt"]
    panels = {key: lines for key, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    plt = _matplotlib()
    if plt is None or not panels:
        return False
    sizes, phases = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    figure, grid = plt.subplots(len(sizes), len(phases), figsize=(4.2 * len(phases), 3.4 * len(sizes)), squeeze=False)
    for (size, phase), lines in panels.items():
        axis = grid[sizes.index(size)][phases.index(phase)]
        for place, (variant, points) in enumerate(lines.items()):
            shown = sorted(points.items())
            style = {
                "marker": _MARKERS[place % len(_MARKERS)],
                "color": color(variant),
                "lw": 1.2,
                "ms": 5,
                "alpha": 0.85,
            }
            axis.plot(*zip(*shown, strict=True), label=variant, **style)
        axis.axhline(1, color=_PROMPT, lw=1, ls="--")
        axis.set_title(_PHASES[phase], loc="left", fontsize=10)
        axis.set_xlabel(_SIZES[size])
        axis.set_ylim(bottom=0)
    for line in grid:
        line[0].set_ylabel("× faster than in the prompt")
    grid[0][0].legend(fontsize=7)
    _save(plt, figure, path, documents)
    return True


def plot_roofline(documents: Sequence[Document], path: Path) -> bool:
    """Share of the roofline bound that each variant reaches, by case."""
    rows = [row for row in _timed(documents) if row["level"] in ("ffn", "kernel") and row["percent_of_roofline"]]
    plt = _matplotlib()
    if plt is None or not rows:
        return False
    cases, names = (list(dict.fromkeys(row[field] for row in rows)) for field in ("case", "variant"))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.5 * len(cases)))
    for place, name in enumerate(names):
        points = [(row["percent_of_roofline"], cases.index(row["case"])) for row in rows if row["variant"] == name]
        marker = _MARKERS[place % len(_MARKERS)]
        axis.scatter(*zip(*points, strict=True), color=color(name), marker=marker, label=name, s=28, alpha=0.85)
    axis.axvline(100, color="black", lw=0.8)
    axis.set_yticks(range(len(cases)), cases, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the roofline bound of its own form (100: nothing left to gain)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(plt, figure, path, documents)
    return True


_SERVED = {
    "requests_per_s": "requests per second,\nmany at once",
    "first_token_ms": "time to first token,\none at a time",
    "per_token_ms": "time per token,\none at a time",
}


def plot_serving(documents: Sequence[Document], path: Path) -> bool:
    """How many times as good as the prompt form: a panel per size of image, a group of bars per measure, a whisker over the turns."""
    (document,) = documents
    plt = _matplotlib()
    if plt is None:
        return False
    sizes = sorted({row["visual_tokens"] for row in document["rows"]})
    figure, grid = plt.subplots(1, len(sizes), figsize=(5.2 * len(sizes), 3.4), sharey=True, squeeze=False)
    for axis, size in zip(grid[0], sizes, strict=True):
        rows = [r for r in document["rows"] if r["visual_tokens"] == size and r["variant"] != "prompt"]
        for place, row in enumerate(rows):
            at = [i + 0.4 * (place - 0.5) for i in range(len(_SERVED))]
            heights = [row[f"{name}_ratio"] for name in _SERVED]
            spread = [row[f"{name}_spread"] for name in _SERVED]
            whiskers = [
                [h - low for h, (low, _) in zip(heights, spread, strict=True)],
                [high - h for h, (_, high) in zip(heights, spread, strict=True)],
            ]
            bars = axis.bar(
                at,
                heights,
                0.36,
                color={"memory": _OURS}.get(row["variant"], _TEXT),
                label=row["variant"],
                yerr=whiskers,
                error_kw={"lw": 0.8},
            )
            axis.bar_label(bars, fmt="%.2f×", fontsize=8, padding=2)
        axis.axhline(1, color=_PROMPT, lw=1, ls="--")
        axis.set_xticks(range(len(_SERVED)), list(_SERVED.values()), fontsize=8)
        axis.set_title(f"{size} visual tokens", loc="left", fontsize=10)
        axis.margins(y=0.1)
    grid[0][0].set_ylabel("× the prompt form (more is better)")
    grid[0][0].legend(fontsize=8)
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
