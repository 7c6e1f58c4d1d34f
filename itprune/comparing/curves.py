"""Curves: accuracy of many methods over what they cost, in colours everybody tells apart.

Shared by the pictures of `itprune compare` and `itprune eval`. matplotlib is imported here alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from itprune.comparing.entries import CONTROLS, DENSE
from itprune.comparing.summary import Line

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart; one marker each besides."""
MARKERS = "osD^vP"
INK, GREY, PALE = "#222222", "#8c8c8c", "#c9c9c9"
DASHES = {"random": ":", "downsample": "--"}
NAMED = 12
"""With more methods than this, the grey ones are not named beside their lines."""
GAP = 0.046
"""Least distance of two labels, as a share of the axis."""
EXACT = "exact match, %"
Curves = Mapping[str, Sequence[Line]]


def matplotlib_figure() -> Any:
    """matplotlib's Figure, which draws without a window.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "the picture needs matplotlib, which is not installed; "
            "get it with: pip install 'itprune[plots]'"
        ) from None
    return Figure


def rank(item: tuple[str, Sequence[Line]]) -> tuple[Any, ...]:
    """Controls first, then those with most budgets, the best first."""
    name, lines = item
    control = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)
    return control, -len(lines), -statistics.fmean(line["accuracy"] for line in lines)


def looks_of(curves: Curves) -> dict[str, dict[str, Any]]:
    """Colour, marker and weight of every method: the best in colour, controls dark, others grey."""
    budgets = max((len(lines) for lines in curves.values()), default=0)
    best = [n for n in curves if n not in CONTROLS and len(curves[n]) == budgets]
    looks: dict[str, dict[str, Any]] = {}
    for name in curves:
        looks[name] = {"color": GREY, "marker": ".", "linewidth": 0.8, "zorder": 2}
    for name in CONTROLS:
        style = {"color": INK, "marker": "x", "linestyle": DASHES[name], "zorder": 3}
        looks[name] = {"linewidth": 1.2, **style}
    for name, colour, marker in zip(best, COLOURS, MARKERS, strict=False):
        looks[name] = {"color": colour, "marker": marker, "linewidth": 1.8, "zorder": 4}
    return looks


def panel(
    axis: Any,
    curves: Curves,
    looks: Mapping[str, dict[str, Any]],
    dense: Line,
    key: str,
    title: str,
    figure: str = EXACT,
) -> None:
    """All methods in one picture, each with its name at the right edge.

    Args:
        axis: of matplotlib.
        curves: lines by method, in the order of `rank`.
        looks: from `looks_of`.
        dense: its line.
        key: field that goes along the axis.
        title: what it is.
        figure: what goes up the axis: a hundred times the lines' accuracy.
    """
    ends = []
    for name, lines in curves.items():
        points = [line for line in lines if line[key] is not None]
        if points:
            curve(axis, points, key, looks[name], bars=looks[name]["color"] != GREY)
            if looks[name]["color"] != GREY or len(curves) <= NAMED:
                end = max(points, key=lambda line: line[key])  # nearest to where names stand
                ends.append((100 * end["accuracy"], end[key], name))
    dense_line(axis, dense)
    axis.set_xlabel(f"{title} (dense: {dense[key]:.3g})")
    axis.set_ylabel(figure)
    axis.set_xlim(left=0)
    plain(axis)
    ends.append((100 * dense["accuracy"], axis.get_xlim()[1], DENSE))
    _label(axis, ends, looks)


def _label(axis: Any, ends: Sequence[tuple[float, float, str]], looks: Mapping[str, Any]) -> None:
    """Names right of the axis, moved apart, each joined to its point furthest right."""
    bottom, top = axis.get_ylim()
    left, right = axis.get_xlim()
    ends = sorted(ends)
    spots = _spread([(y - bottom) / (top - bottom) for y, _, _ in ends])
    for (y, x, name), spot in zip(ends, spots, strict=True):
        colour = looks[name]["color"] if name in looks else INK
        start = ((x - left) / (right - left), (y - bottom) / (top - bottom))
        axis.plot(
            [start[0], 1.02],
            [start[1], spot],
            transform=axis.transAxes,
            color=colour,
            linewidth=0.5,
            alpha=0.6,
            clip_on=False,
            zorder=1,
        )
        weight = "normal" if colour == GREY else "bold"
        axis.text(
            1.025,
            spot,
            name,
            transform=axis.transAxes,
            color=colour,
            fontsize=8.5,
            fontweight=weight,
            va="center",
            ha="left",
        )


def _spread(wanted: Sequence[float]) -> list[float]:
    """Ascending places at least `GAP` apart, as near to the wanted ones as that allows."""
    gap = min(GAP, 1.0 / max(len(wanted), 1))
    spots: list[float] = []
    for place in wanted:
        spots.append(max(place, spots[-1] + gap) if spots else max(place, 0.0))
    ceiling = 1.0
    for i in reversed(range(len(spots))):
        spots[i] = min(spots[i], ceiling)
        ceiling = spots[i] - gap
    return spots


def curve(axis: Any, lines: Sequence[Line], key: str, look: Mapping[str, Any], bars: bool) -> None:
    """A method's points, joined; with their intervals as bars."""
    x = [line[key] for line in lines]
    y = [100 * line["accuracy"] for line in lines]
    axis.plot(x, y, **look)
    if bars:
        below = [100 * (line["accuracy"] - line["low"]) for line in lines]
        above = [100 * (line["high"] - line["accuracy"]) for line in lines]
        axis.errorbar(
            x,
            y,
            yerr=[below, above],
            fmt="none",
            ecolor=look["color"],
            elinewidth=0.9,
            capsize=2,
            alpha=0.7,
            zorder=look.get("zorder", 2),
        )


def dense_line(axis: Any, dense: Line) -> None:
    """Dense's accuracy across the picture, its interval as a band."""
    axis.axhspan(100 * dense["low"], 100 * dense["high"], color=INK, alpha=0.06, linewidth=0)
    axis.axhline(100 * dense["accuracy"], color=INK, linewidth=0.7)


def plain(axis: Any) -> None:
    """No frame, a pale grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#ececec", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
