"""Charts: bars and curves as inline SVG.

Colours are the page's variables, so a chart follows light and dark. What a colour says is said by a
dash pattern or by words, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from itprune.inspecting.rules import Curve

WIDTH, HEIGHT = 330, 190
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MOST_LABELS = 6
RULE_LOOK = {
    "mean": ("--c2", ""),
    "chord": ("--c4", "6 3"),
    "iqr": ("--c5", "2 3"),
    "derivative": ("--c1", "8 3 2 3"),
    "topk": ("--c7", "1 2"),
}
"""Rule -> colour and dash pattern of its line."""


@dataclass(frozen=True)
class Series:
    """Bars of one colour."""

    name: str
    values: Sequence[float]
    colour: str
    """A variable of style.css, such as "--c0"."""


def bars(series: Sequence[Series], labels: Sequence[str], below: str, title: str) -> Markup:
    """Groups of bars, one group a label.

    Args:
        series: as many values as labels each.
        labels: below the groups; some are left out where there is no room.
        below: what they are.
        title: read to those who do not see the chart.
    """
    top = max((v for s in series for v in s.values), default=0) or 1
    room = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    thick = 0.8 * room / len(series)
    parts = _axes(top, below)
    for place, one in enumerate(series):
        for i, value in enumerate(one.values):
            x, y = LEFT + room * i + 0.1 * room + place * thick, _y(value / top)
            parts.append(
                Markup(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
                    'style="fill:var({})"><title>{} {}: {}</title></rect>'
                ).format(x, y, thick, _y(0) - y, one.colour, one.name, labels[i], short(value))
            )
    step = -(-len(labels) // MOST_LABELS)
    for i in range(0, len(labels), step):
        parts.append(_text(LEFT + room * (i + 0.5), HEIGHT - BOTTOM + 15, labels[i]))
    return _svg(parts, title)


def score_curve(curve: Curve, title: str) -> Markup:
    """The sorted scores, what was kept, and where each rule would have cut."""
    low = min(0.0, *curve.scores) if curve.scores else 0.0
    top = max(curve.scores, default=1.0)
    span, count = (top - low) or 1.0, len(curve.scores)
    points = [
        (_x(i + 0.5, count), _y((value - low) / span)) for i, value in enumerate(curve.scores)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = _axes(top, "tokens, best first", low)
    if curve.by_score and curve.kept:
        edge = _x(curve.kept, count)
        under = " ".join(f"{x:.1f},{y:.1f}" for x, y in points[: curve.kept])
        area = f"{LEFT},{_y(0):.1f} {under} {edge:.1f},{_y(0):.1f}"
        parts.append(
            Markup('<polygon points="{}" style="fill:var(--c0);opacity:.35"/>').format(area)
        )
        parts.append(_upright(edge, "--c0", "", 3))
    parts.append(
        Markup('<polyline points="{}" style="fill:none;stroke:var(--c3);stroke-width:2"/>').format(
            line
        )
    )
    for cut in curve.cuts:
        colour, dash = RULE_LOOK[cut.rule]
        parts.append(_upright(_x(cut.count, count), colour, dash, 1.5))
    for i in sorted({0, count // 2, count}):
        parts.append(_text(_x(i, count), HEIGHT - BOTTOM + 15, str(i)))
    return _svg(parts, title)


def swatch(colour: str, dash: str) -> Markup:
    """A piece of a line, for tables."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" width="28" height="8" aria-hidden="true">'
        '<line x1="0" x2="28" y1="4" y2="4" '
        'style="stroke:var({});stroke-width:3;stroke-dasharray:{}"/></svg>'
    ).format(colour, dash or "none")


def short(value: float) -> str:
    """A figure in three digits, with a letter for its size; six letters at most beside a sign, for
    which an axis has room."""
    if 0 < abs(value) < 0.01:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


# ------------------------------------------------------------------------------------- parts
def _x(place: float, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * place / max(count, 1)


def _y(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _axes(top: float, below: str, low: float = 0.0) -> list[Markup]:
    path = f"M{LEFT} {TOP} V{HEIGHT - BOTTOM} H{WIDTH - RIGHT}"
    parts = [Markup('<path class="axis" d="{}"/>').format(path)]
    for share in (0.0, 0.5, 1.0):
        text = short(low + share * (top - low))
        parts.append(_text(LEFT - 6, _y(share) + 4, text, "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, below, soft=True))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "middle", soft: bool = False) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}">{}</text>').format(
        x, y, anchor, "soft" if soft else "", text
    )


def _upright(x: float, colour: str, dash: str, width: float) -> Markup:
    return Markup(
        '<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}" '
        'style="stroke:var({3});stroke-width:{4};stroke-dasharray:{5}"/>'
    ).format(x, TOP, HEIGHT - BOTTOM, colour, width, dash or "none")


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" width="100%" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, title
    )
    return start + Markup("").join(parts) + Markup("</svg>")
