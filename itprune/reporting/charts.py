"""The charts of a report: loss over steps, accuracy over the budget, and bars.

Each is a title, a picture and a legend for the page; none where nothing was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from itprune.comparing.entries import CONTROLS, DENSE
from itprune.reporting.metrics import number
from itprune.reporting.recorded import Training
from itprune.reporting.scored import Score, Scores
from itprune.reporting.summary import Summary, accuracies
from itprune.reporting.svg import LEFT, RIGHT, WIDTH, Frame, Look, chart, cut, labels, tag, text

POINTS = 500
"""Of a line: more are no finer on a page, only longer to load."""
WINDOW = 10
"""The smoothed curve is a mean over a part of the log: one in so many."""
BAR, SPACE = 18, 40
"""Height of a bar, and from one to the next."""
LINE = 50
"""Letters above a bar."""
SERIES = 8
"""Drawn in one picture; the others are in the table."""
LEAST = 0.02
"""Room above and below shares: where all are alike, there is still an axis, within 0 and 1."""
APART = 2.5
"""Between the points of two series at one budget, so that intervals do not cover each other."""
FIRST = (DENSE, *CONTROLS)
"""Methods that every benchmark has: drawn first, so that they look alike in all pictures."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A picture for the page."""

    title: str
    picture: Markup
    legend: Sequence[tuple[Markup, str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one method or run; `spans` are their intervals."""

    name: str
    points: Sequence[Point]
    spans: Sequence[tuple[float, float] | None]


def charts(summary: Summary) -> list[Chart]:
    """All that can be drawn of runs and scores."""
    runs = summary.runs
    found = [_losses(runs), _evaluated(runs)]
    for name, several in summary.scores.items():
        found += [_scores(name, one) for one in several]
    times = {name: run.metrics["step_time_s"] for name, run in runs.items()}
    peaks = {name: run.metrics["peak_mb"] for name, run in runs.items()}
    found.append(_bars("Time of a step, median", times, "s"))
    found.append(_bars("Largest memory of a process", peaks, "MB"))
    return [one for one in found if one is not None]


# ------------------------------------------------------------------------------- loss
def _losses(runs: Mapping[str, Training]) -> Chart | None:
    curves = {name: curve(run) for name, run in runs.items()}
    points = [point for found in curves.values() for point in found]
    if not points:
        return None
    frame = Frame.around([x for x, _ in points], [y for _, y in points], log=True)
    raw, bold, ends, legend = [], [], [], []
    for index, (name, found) in enumerate(curves.items()):
        if not found:
            continue
        look, line = Look(index), thinned(smoothed(found))
        raw.append(look.line([frame.place(*point) for point in thinned(found)], 1, faint=True))
        bold.append(look.line([frame.place(*point) for point in line], 2.2, faint=False))
        bold += [look.marker(*frame.place(*line[0]))] if len(line) == 1 else []
        ends.append((name, look, *frame.place(*line[-1])))
        legend.append((look.sample(marked=False), name))
    inside = [frame.axes("optimizer steps", _loss_axis(frame)), *raw, *bold, labels(ends)]
    note = f"Faint: as logged. Strong: its mean over a {WINDOW}th of the curve, around each step."
    return Chart("Training loss", chart("Training loss over steps", inside), legend, note)


def _loss_axis(frame: Frame) -> str:
    return "loss, logarithmic" if frame.log else "loss"


def curve(run: Training) -> list[Point]:
    """Step and loss of every log, in order."""
    found = [(number(entry.get("step")), number(entry.get("loss"))) for entry in run.history]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of each point's neighbours, itself in the middle; fewer at both ends."""
    reach = len(points) // (2 * WINDOW)
    return [
        (x, statistics.fmean(y for _, y in points[max(i - reach, 0) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about POINTS of them: of each stretch the lowest and the highest, so that a spike
    stays to be seen."""
    if len(points) <= POINTS:
        return list(points)
    size = -(-2 * len(points) // POINTS)
    found: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted({*ends, part[-1]} if start + size >= len(points) else ends)
    return found


# ------------------------------------------------------------------------------- accuracy
def _evaluated(runs: Mapping[str, Training]) -> Chart | None:
    found = []
    for name, run in runs.items():
        rows = accuracies(run)
        points = [(row["keep"] or 0.0, row["accuracy"] or 0.0) for row in rows]
        found.append(Series(name, points, [_span(row["low"], row["high"]) for row in rows]))
    return _over_keep(
        "Accuracy over keep, last evaluation",
        found,
        "accuracy",
        "visual tokens kept (target)",
        percent=True,
        note="Bars: 95 % interval (Wilson) where the number of samples is known.",
    )


def _scores(folder: str, one: Scores) -> Chart | None:
    shown = [score for score in one.scores if score.value is not None]
    names = dict.fromkeys(score.method for score in shown)
    best = {n: statistics.fmean(s.value or 0 for s in shown if s.method == n) for n in names}
    others = sorted(names.keys() - FIRST, key=lambda n: (-best[n], n))
    order = [*(name for name in FIRST if name in names), *others][:SERIES]
    found = []
    for name in order:
        mine = sorted((score for score in shown if score.method == name), key=_kept)
        points = [(_kept(score), score.value or 0.0) for score in mine]
        found.append(Series(name, points, [_span(score.low, score.high) for score in mine]))
    left = len(names) - len(order)
    note = f"Model {one.model}. Bars: 95 % bootstrap interval."
    note += f" {left} further method(s) are in the table." if left else ""
    return _over_keep(
        f"{folder}: {Path(one.data).name}",
        found,
        one.metric,
        "visual tokens kept, average over the layers",
        percent=one.share,
        note=note,
    )


def _kept(score: Score) -> float:
    """Tokens as measured; a model without pictures was given none, so its budget stands."""
    return score.tokens if score.tokens is not None else score.keep or 0.0


def _over_keep(
    title: str, found: Sequence[Series], y_name: str, x_name: str, percent: bool, note: str
) -> Chart | None:
    xs = [x for series in found for x, _ in series.points]
    ys = [y for series in found for _, y in series.points]
    ys += [end for series in found for span in series.spans if span is not None for end in span]
    if not xs:
        return None
    if percent:
        ys += [max(min(ys) - LEAST, 0.0), min(max(ys) + LEAST, 1.0)]
    frame = Frame.around([0.0, 1.0, *xs], ys)
    inside, ends, legend = [frame.axes(x_name, y_name, percent)], [], []
    for index, series in enumerate(found):
        if not series.points:
            continue
        look, shift = Look(index), APART * (index - (len(found) - 1) / 2)
        places = [(x + shift, y) for x, y in (frame.place(*point) for point in series.points)]
        if len(places) > 1:
            inside.append(look.line(places, 1.5, faint=False))
        for (x, y), (at, _), span in zip(places, series.points, series.spans, strict=True):
            if span is not None:
                low, high = (frame.place(at, end)[1] for end in span)
                style = f"stroke:{look.colour};stroke-width:1.5"
                inside.append(tag("line", x1=x, y1=low, x2=x, y2=high, style=style))
            inside.append(look.marker(x, y))
        ends.append((series.name, look, *places[-1]))
        legend.append((look.sample(marked=True), series.name))
    return Chart(title, chart(title, [*inside, labels(ends)]), legend, note)


def _span(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


# ------------------------------------------------------------------------------- bars
def _bars(title: str, found: Mapping[str, float | None], unit: str) -> Chart | None:
    """Horizontal bars from zero, each with its name above and its value behind."""
    largest = max((value for value in found.values() if value is not None), default=0.0)
    if largest <= 0:
        return None
    inside = []
    for index, (name, value) in enumerate(found.items()):
        top = index * SPACE
        inside.append(text(0.0, top + 10.0, cut(name, LINE)))
        if value is None:
            inside.append(text(0.0, top + 29.0, "not measured", soft=True))
            continue
        width = value / largest * (WIDTH - LEFT - RIGHT / 2)
        style = f"fill:{Look(index).colour}"
        inside.append(tag("rect", x=0, y=top + 16, width=width, height=BAR, rx=2, style=style))
        told = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        inside.append(text(width + 6, top + 29.0, f"{told} {unit}"))
    return Chart(title, chart(title, inside, height=float(len(found) * SPACE)))
