"""Draws `idea.png`, the README's picture: an image as memory slots of every FFN, beside an image as tokens of the prompt.

python docs/images/draw_idea.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

TEXT, IMAGE, MODEL, INK, GREY = "#c3d3e8", "#f2a65a", "#9db4d3", "#2b2b2b", "#5f5f5f"
ROW, TOKEN = 0.3, 0.13


def label(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Centered text."""
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 10, "color": INK, **style})


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, edge: str = "none") -> None:
    """A rounded box."""
    style = "round,pad=0,rounding_size=0.05"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec=edge, lw=1.2))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A straight arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=GREY, lw=1.3))


def picture(axes: Axes, x: float, y: float, size: float = 1.1) -> None:
    """A landscape under a grid of patches."""
    axes.add_patch(Rectangle((x, y), size, size, fc="#bcdcf2", ec="none"))
    hills = ((0, 0.3), (0.38, 0.66), (0.7, 0.36), (1, 0.56), (1, 0), (0, 0))
    axes.fill([x + size * u for u, _ in hills], [y + size * v for _, v in hills], color="#7fa86b")
    for i in range(1, 4):
        axes.plot([x + i * size / 4] * 2, [y, y + size], color="white", lw=0.9)
        axes.plot([x, x + size], [y + i * size / 4] * 2, color="white", lw=0.9)
    axes.add_patch(Rectangle((x, y), size, size, fc="none", ec=INK, lw=1))
    label(axes, x + size / 2, y - 0.22, "256 patches", fontsize=9, color=GREY)


def tokens(axes: Axes, x: float, y: float, count: int, color: str, text: str) -> None:
    """A row of tokens, each standing for eight."""
    pitch = TOKEN + 0.035
    for i in range(count):
        box(axes, x + i * pitch, y, TOKEN, 0.5, color)
    label(axes, x + count * pitch / 2, y - 0.25, text, fontsize=9, color=GREY)


def pairs(axes: Axes, x: float, y: float, count: int, color: str, key: str, value: str) -> None:
    """Rows of keys, and the value that each adds."""
    middle = y + count * ROW / 2 - 0.03
    for left, text in ((x, key), (x + 1.7, value)):
        for row in range(count):
            axes.add_patch(Rectangle((left, y + row * ROW), 1.3, ROW - 0.06, fc=color, ec="none"))
        label(axes, left + 0.65, middle, text, bbox={"fc": color, "ec": "none", "pad": 1.5})
    arrow(axes, (x + 1.32, middle), (x + 1.68, middle))


def layer(axes: Axes, x: float, width: float, attention: str) -> None:
    """The outline of a layer and its attention."""
    box(axes, x, 1.75, width, 4.2, "#fafafa", "#bbbbbb")
    label(axes, x + 0.12, 5.72, "each layer", ha="left", fontsize=9, color=GREY)
    box(axes, x + 0.25, 2.0, width - 0.5, 0.55, "#e4e4e4")
    label(axes, x + width / 2, 2.27, attention)
    arrow(axes, (x + width / 2, 1.2), (x + width / 2, 1.97))
    arrow(axes, (x + width / 2, 2.58), (x + width / 2, 2.97))


def memvp(axes: Axes) -> None:
    """The image extends the FFNs' memory; the input is the text alone."""
    layer(axes, 2.3, 4.1, "attention over 64 tokens")
    pairs(axes, 2.85, 3.05, 5, MODEL, "keys $K$", "values $V$")
    pairs(axes, 2.85, 4.68, 3, IMAGE, "$K_v$", "$V_v$")
    label(axes, 6.25, 5.72, "FFN of 64 tokens", ha="right", fontsize=9, color=GREY)
    picture(axes, 0.2, 4.58)
    arrow(axes, (1.34, 5.1), (2.8, 5.1))
    label(axes, 1.8, 5.27, "project", fontsize=9, color=GREY)
    tokens(axes, 3.69, 0.65, 8, TEXT, "64 text tokens")
    label(axes, 4.35, -0.05, "$y$ = act($x\\,[K; K_v]^T$) $[V; V_v]$", fontsize=11)


def prompt(axes: Axes) -> None:
    """The image lengthens the input of every layer."""
    layer(axes, 0.2, 6.2, "attention over 320 tokens")
    pairs(axes, 1.8, 3.05, 5, MODEL, "keys $K$", "values $V$")
    label(axes, 6.25, 5.72, "FFN of 320 tokens", ha="right", fontsize=9, color=GREY)
    tokens(axes, 0.0, 0.65, 32, IMAGE, "256 visual tokens: the patches, projected")
    tokens(axes, 5.28, 0.65, 8, TEXT, "64 text tokens")
    label(axes, 3.3, -0.05, "$y$ = act($x\\,K^T$) $V$", fontsize=11)


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(11, 5.4), layout=ConstrainedLayoutEngine(h_pad=0.1))
    left, right = figure.subplots(1, 2)
    left.set_title("MemVP: the image in the FFNs' memory", fontsize=13, color=INK)
    right.set_title("Usual: the image in the prompt", fontsize=13, color=INK)
    for axes, draw in ((left, memvp), (right, prompt)):
        axes.set(xlim=(-0.05, 6.65), ylim=(-0.3, 6.05), aspect="equal")
        axes.axis("off")
        draw(axes)
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=110)


if __name__ == "__main__":
    main()
