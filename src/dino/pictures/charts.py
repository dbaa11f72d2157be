"""Curves as SVG inside a page, drawn by matplotlib in the page's own colours (light or dark)."""

import io
import math
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

Points = list[tuple[float, float]]  # (step, value)

STRETCHES = 200  # More points than this are drawn as the mean of each stretch, in a band of its least and largest.
CURVES = 5  # Colours that the page has for curves: --c0 to --c4.
# matplotlib writes colours as they are given; these stand for what the page's style sheet says.
# (Not black, which it leaves out.)
_COLORS = {f"#0000c{i}": f"var(--c{i})" for i in range(CURVES)} | {"#0000aa": "var(--soft)", "#0000bb": "var(--line)"}
_SOFT, _LINE = "#0000aa", "#0000bb"
_STYLE: Any = {
    "svg.fonttype": "none",  # Text stays text.
    "svg.hashsalt": "dino",  # The same curves give the same file.
    "font.size": 9,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.labelcolor": _SOFT,
    "grid.color": _LINE,
}


def line_chart(series: dict[str, Points], reference: tuple[float, str] | None = None) -> str:
    """Curves over steps as an ``<svg>`` to be put into a page, or an empty text where no value is finite.

    ``reference``: a dashed level with its name. The page defines ``--c0`` to ``--c4``, ``--soft`` and ``--line``.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    if not any(finite.values()):
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.2), layout="constrained")
        axes = figure.add_subplot(frameon=False)
        for i, points in enumerate(finite.values()):
            if points:
                _draw(axes, points, f"#0000c{i % CURVES}")
        if reference:
            level, name = reference
            axes.axhline(level, color=_SOFT, linewidth=1, linestyle="--")
            place = axes.get_yaxis_transform()  # x from 0 to 1, y a value.
            axes.annotate(name, (1, level), (0, 2), place, "offset points", color=_SOFT, ha="right")
        if all(value >= 0 for points in finite.values() for _, value in points):
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))  # No room for what cannot be.
        axes.grid(axis="y", linewidth=0.8)
        axes.tick_params(length=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _inline(file.getvalue())


def _draw(axes: Axes, points: Points, color: str) -> None:
    parts = np.array_split(np.asarray(points), min(len(points), STRETCHES))
    steps, mean, least, largest = np.array([[*part.mean(0), part[:, 1].min(), part[:, 1].max()] for part in parts]).T
    axes.plot(steps, mean, color=color, linewidth=1.6, marker="o" if len(points) <= 30 else "", markersize=3)
    if len(points) > STRETCHES:
        axes.fill([*steps, *steps[::-1]], [*least, *largest[::-1]], color=color, alpha=0.2, linewidth=0)


def _inline(svg: str) -> str:
    """What several in one page need: no document around it, no names that repeat, the page's colours and font."""
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| id=\"[a-z]+[\w.]*_\d+\"", "", svg)
    svg = re.sub(r"#0000(aa|bb|c[0-4])", lambda match: _COLORS[match[0]], svg)
    svg = re.sub(r"font-family: [^;]*;|\s*transform=\"rotate\(-0[^)]*\)\"", "", svg)
    svg = re.sub(r"(?<=\.\d\d)\d+(?=[^<>]*>)", "", svg)  # Hundredths are enough for a place, not for a label.
    size = re.search(r"viewBox=\"[^\"]*\"", svg)
    assert size is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    return f'<svg {size[0]} role="img">' + re.sub(r"\s*\n\s*", " ", body).rstrip()
