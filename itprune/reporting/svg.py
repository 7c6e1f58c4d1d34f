"""A chart's frame as SVG text: axes, ticks, labels that do not cover each other.

Colours are the page's variables, so a chart follows its light and dark look; series are told apart
by dash and marker, too. Every text is escaped. Sizes are in the chart's own units, which a column
of the page, and a phone, show at about one pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

ORDER = (3, 4, 2, 5, 0, 7)
"""Places in the page's palette, the darkest first. Yellow is not seen as a line on white, and light
blue is too near to blue on a dark page."""
DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")
MARKERS = ("circle", "square", "diamond", "triangle")
WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 96, 12, 40
WIDE = 8
"""Largest over smallest value from which an axis may be logarithmic."""
GAP = 13
"""Least distance of two labels."""
LETTERS = 11
"""Of a label beside its line; the legend has the whole name."""


def tag(name: str, *inside: str, **attributes: Any) -> Markup:
    """One element; `stroke_width` is written stroke-width, and all texts are escaped."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{pairs}>") + Markup("").join(inside) + Markup(f"</{name}>")


@dataclass(frozen=True)
class Look:
    """How the series with a number is drawn."""

    index: int

    @property
    def colour(self) -> str:
        return f"var(--c{ORDER[self.index % len(ORDER)]})"

    @property
    def dash(self) -> str:
        return DASHES[self.index % len(DASHES)]

    def line(self, points: Sequence[tuple[float, float]], width: float, faint: bool) -> Markup:
        """A line through points."""
        dash = "none" if faint else self.dash
        look = f"fill:none;stroke:{self.colour};stroke-width:{width};stroke-dasharray:{dash}"
        path = "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)
        return tag("path", d=path, style=f"{look};opacity:{0.35 if faint else 1}")

    def marker(self, x: float, y: float, size: float = 4.0) -> Markup:
        """A point; every series in turn has another shape."""
        style = f"fill:{self.colour};stroke:var(--card)"
        shape = MARKERS[self.index % len(MARKERS)]
        if shape == "circle":
            return tag("circle", cx=x, cy=y, r=size, style=style)
        corners = {
            "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
            "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            "triangle": ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        }[shape]
        points = " ".join(f"{_short(x + size * a)},{_short(y + size * b)}" for a, b in corners)
        return tag("polygon", points=points, style=style)

    def sample(self, marked: bool) -> Markup:
        """The sign of a legend."""
        inside = [self.line([(0, 6), (28, 6)], 2.5, faint=False)]
        inside += [self.marker(14, 6)] if marked else []
        box = {"width": 28, "height": 12, "viewBox": "0 0 28 12", "style": "flex:none"}
        return tag("svg", *inside, **box, aria_hidden="true")


@dataclass(frozen=True)
class Frame:
    """Two axes: from values to places."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    """Whether the upward axis is logarithmic; `y` are logarithms then."""

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], log: bool = False) -> Frame:
        """Axes that hold all values, with a little room above and below.

        Args:
            xs: values along.
            ys: values upward.
            log: whether a wide range, with no zero in it, may have a logarithmic axis.
        """
        wide = log and min(ys) > 0 and max(ys) / min(ys) > WIDE
        ends = [math.log10(y) for y in ys] if wide else ys
        return cls(_range(xs, 0.0), _range(ends, 0.06), wide)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point stands."""
        up = math.log10(y) if self.log else y
        return (
            LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (up - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM),
        )

    def axes(self, x_name: str, y_name: str, percent: bool = False) -> Markup:
        """Lines, ticks and names of both axes."""
        found = [_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)]
        for value in ticks(*self.x):
            x, y = self.place(value, 1.0)[0], float(HEIGHT - BOTTOM)
            found += [_line(x, y, x, y + 4), text(x, y + 17, _number(value), "middle")]
        for value in powers(*self.y) if self.log else ticks(*self.y):
            y = self.place(self.x[0], value)[1]
            told = f"{_number(100 * value)} %" if percent else _number(value)
            found.append(_line(LEFT, y, WIDTH - RIGHT, y, faint=True))
            found.append(text(LEFT - 6, y + 4, told, "end"))
        found.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name, "middle", soft=True))
        found.append(text(2, TOP - 14, y_name, "start", soft=True))
        return Markup("").join(found)


def chart(title: str, inside: Sequence[Markup], height: float = HEIGHT) -> Markup:
    """The picture as a whole; `title` is what a screen reader says."""
    # Above the plot stands the name of the upward axis.
    box = f"0 -14 {WIDTH} {_short(height + 14)}"
    look = "width:100%;max-width:32rem"
    return tag("svg", *inside, viewBox=box, role="img", aria_label=title, style=look)


def labels(ends: Sequence[tuple[str, Look, float, float]]) -> Markup:
    """Names beside the ends of their lines, moved apart, never out of the chart.

    Args:
        ends: name, look, x and y of each.
    """
    found = []
    room = max((HEIGHT - TOP) / max(len(ends), 1), 1.0)
    last = -math.inf
    spread = []
    for name, look, x, y in sorted(ends, key=lambda end: end[3]):
        last = max(y, last + min(GAP, room))
        spread.append((name, look, x, y, last))
    over = max(last - (HEIGHT - BOTTOM), 0.0) if spread else 0.0
    for name, look, x, y, at in spread:
        at -= over
        style = f"stroke:{look.colour};stroke-width:1"
        found.append(tag("line", x1=x + 2, y1=y, x2=x + 9, y2=at, style=style))
        found.append(text(x + 11, at + 4, cut(name), "start"))
    return Markup("").join(found)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within a range."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + i) * step for i in range(count)]


def powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range of logarithms."""
    found = [n * 10.0**k for k in range(math.floor(low), math.ceil(high)) for n in (1, 2, 5)]
    return [value for value in found if low <= math.log10(value) <= high]


def cut(name: str, letters: int = LETTERS) -> str:
    """A name cut in its middle: runs often differ in their ends."""
    if len(name) <= letters:
        return name
    half = (letters - 1) // 2
    return f"{name[:half]}…{name[-(letters - 1 - half) :]}"


def text(x: float, y: float, words: str, anchor: str = "start", soft: bool = False) -> Markup:
    """Words at a place."""
    look = {"class_": "soft"} if soft else {}
    return tag("text", escape(words), x=x, y=y, text_anchor=anchor, **look)


def _line(x1: float, y1: float, x2: float, y2: float, faint: bool = False) -> Markup:
    look = {"style": "stroke:var(--line)"} if faint else {"class_": "axis"}
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **look)


def _range(values: Sequence[float], room: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or so close that ticks fail
        reach = abs(low) / 10 or 1.0
        return low - reach, high + reach
    more = (high - low) * room
    return low - more, high + more


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _short(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
