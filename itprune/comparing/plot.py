"""pareto.png: accuracy over the visual tokens kept and over the time of a prefill.

Twenty methods cannot have twenty colours that everybody tells apart. Above, the best few and the
controls stand out and are named beside their lines, the others are grey; below, every method has a
small picture of its own. matplotlib is imported here alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.entries import CONTROLS, DENSE
from itprune.comparing.summary import Line

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers tell apart; one marker each besides."""
MARKERS = "osD^vP"
INK, GREY, PALE = "#222222", "#8c8c8c", "#c9c9c9"
DASHES = {"random": ":", "downsample": "--"}
CAPTION = (
    "Colour: the best on average of those that reach every budget. Grey: the others, one by one "
    "below. Black: controls. Bars and band: 95 % bootstrap intervals; line: dense."
)
ACROSS = 5
"""Small pictures in a row."""
NAMED = 12
"""With more methods than this, the grey ones are named in the small pictures only."""
GAP = 0.046
"""Least distance of two labels, as a share of the axis."""
Curves = Mapping[str, Sequence[Line]]


def draw_pareto(lines: Sequence[Line], out: Path) -> None:
    """Draws the picture.

    Args:
        lines: from `summarise`.
        out: the PNG to write.

    Raises:
        ValueError: matplotlib is not installed, or nothing was measured.
    """
    figure_class = _matplotlib()
    shown = [line for line in lines if line["accuracy"] is not None]
    dense = next((line for line in shown if line["method"] == DENSE), None)
    if dense is None:
        raise ValueError("nothing to draw: no row has figures")
    curves: dict[str, list[Line]] = {}
    for line in sorted(shown, key=lambda line: line["layer_average"]):
        if line is not dense:
            curves.setdefault(line["method"], []).append(line)
    curves = dict(sorted(curves.items(), key=_rank))
    timed = any(line["prefill_ms"] is not None for line in shown)
    looks = _looks(curves)
    rows = -(-len(curves) // ACROSS)
    figure = figure_class(figsize=(15, 6.5 + 1.9 * rows), layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=[6.5, max(1.9 * rows, 0.1)])
    upper.suptitle(CAPTION, fontsize=9, x=0.01, ha="left")
    panels = upper.subplots(1, 1 + timed, squeeze=False)[0]
    _panel(panels[0], curves, looks, dense, "layer_average", "visual tokens kept, layer average")
    if timed:
        _panel(panels[1], curves, looks, dense, "prefill_ms", "prefill of one batch, ms")
    if rows:
        _small(
            lower.subplots(rows, ACROSS, squeeze=False, sharex=True, sharey=True),
            curves,
            looks,
            dense,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "the picture needs matplotlib, which is not installed; "
            "get it with: pip install 'itprune[plots]'"
        ) from None
    return Figure


def _rank(item: tuple[str, Sequence[Line]]) -> tuple[Any, ...]:
    """Controls first, then those with most budgets, the best first."""
    name, lines = item
    control = CONTROLS.index(name) if name in CONTROLS else len(CONTROLS)
    return control, -len(lines), -statistics.fmean(line["accuracy"] for line in lines)


def _looks(curves: Curves) -> dict[str, dict[str, Any]]:
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


def _panel(
    axis: Any,
    curves: Curves,
    looks: Mapping[str, dict[str, Any]],
    dense: Line,
    key: str,
    title: str,
) -> None:
    """All methods in one picture, each with its name at the right edge."""
    ends = []
    for name, lines in curves.items():
        points = [line for line in lines if line[key] is not None]
        if points:
            _curve(axis, points, key, looks[name], bars=looks[name]["color"] != GREY)
            if looks[name]["color"] != GREY or len(curves) <= NAMED:
                ends.append((100 * points[-1]["accuracy"], points[-1][key], name))
    _dense(axis, dense)
    axis.set_xlabel(f"{title} (dense: {dense[key]:.3g})")
    axis.set_ylabel("exact match, %")
    axis.set_xlim(left=0)
    _plain(axis)
    ends.append((100 * dense["accuracy"], axis.get_xlim()[1], DENSE))
    _label(axis, ends, looks)


def _label(axis: Any, ends: Sequence[tuple[float, float, str]], looks: Mapping[str, Any]) -> None:
    """Names right of the axis, moved apart, each joined to its last point."""
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


def _small(axes: Any, curves: Curves, looks: Mapping[str, Any], dense: Line) -> None:
    """One small picture a method: its curve over all the others."""
    panels = list(axes.flat)
    for panel, name in zip(panels, curves, strict=False):
        for other in curves:
            back = {"color": PALE, "linewidth": 0.6}
            _curve(panel, curves[other], "layer_average", back, bars=False)
        look = looks[name] if looks[name]["color"] != GREY else {**looks[name], "color": INK}
        _curve(panel, curves[name], "layer_average", {**look, "markersize": 4, "zorder": 5}, True)
        _dense(panel, dense)
        panel.set_title(name, fontsize=9, color=look["color"], loc="left", pad=3)
        panel.set_xlim(0, None)
        _plain(panel)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    for row in axes:
        row[0].set_ylabel("exact match, %", fontsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("layer average", fontsize=8)


def _curve(axis: Any, lines: Sequence[Line], key: str, look: Mapping[str, Any], bars: bool) -> None:
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


def _dense(axis: Any, dense: Line) -> None:
    axis.axhspan(100 * dense["low"], 100 * dense["high"], color=INK, alpha=0.06, linewidth=0)
    axis.axhline(100 * dense["accuracy"], color=INK, linewidth=0.7)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#ececec", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
