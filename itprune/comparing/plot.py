"""pareto.png: accuracy over the visual tokens kept and over the time of a prefill.

Twenty methods cannot have twenty colours that everybody tells apart. Above, the best few and the
controls stand out and are named beside their lines, the others are grey; below, every method has a
small picture of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.curves import (
    EXACT,
    GREY,
    INK,
    PALE,
    Curves,
    curve,
    dense_line,
    looks_of,
    matplotlib_figure,
    panel,
    plain,
    rank,
)
from itprune.comparing.entries import DENSE
from itprune.comparing.summary import Line

CAPTION = (
    "Colour: the best on average of those that reach every budget. Grey: the others, one by one "
    "below. Black: controls. Bars and band: 95 % bootstrap intervals; line: dense."
)
ACROSS = 5
"""Small pictures in a row."""


def draw_pareto(lines: Sequence[Line], out: Path) -> None:
    """Draws the picture.

    Args:
        lines: from `summarise`.
        out: the PNG to write.

    Raises:
        ValueError: matplotlib is not installed, or nothing was measured.
    """
    figure_class = matplotlib_figure()
    shown = [line for line in lines if line["accuracy"] is not None]
    dense = next((line for line in shown if line["method"] == DENSE), None)
    if dense is None:
        raise ValueError("nothing to draw: no row has figures")
    curves: dict[str, list[Line]] = {}
    for line in sorted(shown, key=lambda line: line["layer_average"]):
        if line is not dense:
            curves.setdefault(line["method"], []).append(line)
    curves = dict(sorted(curves.items(), key=rank))
    timed = any(line["prefill_ms"] is not None for line in shown)
    looks = looks_of(curves)
    rows = -(-len(curves) // ACROSS)
    figure = figure_class(figsize=(15, 6.5 + 1.9 * rows), layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=[6.5, max(1.9 * rows, 0.1)])
    upper.suptitle(CAPTION, fontsize=9, x=0.01, ha="left")
    panels = upper.subplots(1, 1 + timed, squeeze=False)[0]
    panel(panels[0], curves, looks, dense, "layer_average", "visual tokens kept, layer average")
    if timed:
        panel(panels[1], curves, looks, dense, "prefill_ms", "prefill of one batch, ms")
    if rows:
        _small(
            lower.subplots(rows, ACROSS, squeeze=False, sharex=True, sharey=True),
            curves,
            looks,
            dense,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def _small(axes: Any, curves: Curves, looks: Mapping[str, Any], dense: Line) -> None:
    """One small picture a method: its curve over all the others."""
    panels = list(axes.flat)
    for place, name in zip(panels, curves, strict=False):
        for other in curves:
            back = {"color": PALE, "linewidth": 0.6}
            curve(place, curves[other], "layer_average", back, bars=False)
        look = looks[name] if looks[name]["color"] != GREY else {**looks[name], "color": INK}
        curve(place, curves[name], "layer_average", {**look, "markersize": 4, "zorder": 5}, True)
        dense_line(place, dense)
        place.set_title(name, fontsize=9, color=look["color"], loc="left", pad=3)
        place.set_xlim(0, None)
        plain(place)
    for place in panels[len(curves) :]:
        place.set_axis_off()
    for row in axes:
        row[0].set_ylabel(EXACT, fontsize=8)
    for place in axes[-1]:
        place.set_xlabel("layer average", fontsize=8)
