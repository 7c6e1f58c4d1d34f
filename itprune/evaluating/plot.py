"""pareto.png: the headline figure over the visual tokens kept and over answers per second.

One row of pictures a run, drawn with the curves of `itprune compare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itprune.comparing.curves import INK, looks_of, matplotlib_figure, panel, rank
from itprune.comparing.entries import DENSE
from itprune.evaluating.runs import Run
from itprune.evaluating.summary import Line

CAPTION = (
    "Colour: the best on average of those that reach every budget. Black: controls. "
    "Bars and band: 95 % bootstrap intervals; line and star: dense."
)
AXES = {
    "layer_average": "visual tokens kept, layer average",
    "answers_per_s": "answers per second",
}


def draw_pareto(runs: Sequence[Run], out: Path) -> None:
    """Draws the picture.

    Args:
        runs: those of a folder.
        out: the PNG to write.

    Raises:
        ValueError: matplotlib is not installed, or no run shows a picture.
    """
    figure_class = matplotlib_figure()
    shown = [(run, points) for run in runs if len(points := _points(run)) > 1]
    if not shown:
        raise ValueError("nothing to draw: no method has figures")
    figure = figure_class(figsize=(14, 0.5 + 5 * len(shown)), layout="constrained")
    figure.suptitle(CAPTION, fontsize=9, x=0.01, ha="left")
    rows = figure.subplots(len(shown), len(AXES), squeeze=False)
    for places, (run, points) in zip(rows, shown, strict=True):
        for axis, (key, title) in zip(places, AXES.items(), strict=True):
            _draw(axis, run, points, key, title)
    figure.savefig(out, dpi=100)


def _draw(axis: Any, run: Run, points: Sequence[Line], key: str, title: str) -> None:
    dense = next(line for line in points if line["method"] == DENSE)
    curves: dict[str, list[Line]] = {}
    for line in sorted(points, key=lambda line: line["layer_average"]):
        if line is not dense:
            curves.setdefault(line["method"], []).append(line)
    curves = dict(sorted(curves.items(), key=rank))
    if key != "layer_average":  # where dense is 1, far right of all others
        axis.plot([dense[key]], [100 * dense["accuracy"]], marker="*", markersize=10, color=INK)
    panel(axis, curves, looks_of(curves), dense, key, title, run.unit)
    axis.set_title(f"{run.head['task']}: {run.head['model']}", fontsize=9, loc="left")


def _points(run: Run) -> list[Line]:
    """Lines as curves take them: a hundred times `accuracy` is what stands at the axis."""
    share = run.scale / 100
    return [
        {
            **line,
            "accuracy": line["value"] * share,
            "low": line["low"] * share,
            "high": line["high"] * share,
        }
        for line in run.lines
        if line["value"] is not None and line["layer_average"] is not None
    ]
