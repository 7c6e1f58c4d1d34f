"""Charts: bars as high as their values, lines where the rules cut."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as tree

import pytest

from itprune.inspecting import charts
from itprune.inspecting.charts import Series, bars, score_curve, short
from itprune.inspecting.rules import Curve, Cut

ROOM = charts.WIDTH - charts.LEFT - charts.RIGHT
HIGH = charts.HEIGHT - charts.TOP - charts.BOTTOM


def drawn(svg: str, tag: str) -> list[tree.Element]:
    return list(tree.fromstring(svg).iter(tag))


def test_bars_are_as_high_as_their_values() -> None:
    series = [Series("dense", [4, 8], "--c7"), Series("pruned", [1, 2], "--c0")]
    rects = drawn(bars(series, ["0", "1"], "layer", "A title"), "rect")
    heights = [float(rect.get("height", 0)) for rect in rects]
    assert heights == pytest.approx([HIGH / 2, HIGH, HIGH / 8, HIGH / 4], abs=0.1)
    for rect, height in zip(rects, heights, strict=True):
        assert float(rect.get("y", 0)) + height == pytest.approx(charts.TOP + HIGH, abs=0.11)
    said = [rect[0].text for rect in rects]
    assert said == ["dense 0: 4", "dense 1: 8", "pruned 0: 1", "pruned 1: 2"]
    assert "--c7" in rects[0].get("style", "")


def test_bars_stand_beside_each_other() -> None:
    series = [Series(str(i), [1.0] * 5, "--c0") for i in range(3)]
    rects = drawn(bars(series, list("abcde"), "x", "t"), "rect")
    spans = sorted((float(r.get("x", 0)), float(r.get("width", 0))) for r in rects)
    for (x, width), (after, _) in itertools.pairwise(spans):
        assert x + width <= after + 0.11
    assert spans[0][0] >= charts.LEFT
    assert spans[-1][0] + spans[-1][1] <= charts.WIDTH - charts.RIGHT


@pytest.mark.parametrize("depth", [1, 4, 32, 80])
def test_labels_leave_each_other_room(depth: int) -> None:
    labels = [f"layer{i}" for i in range(depth)]
    svg = bars([Series("a", [1.0] * depth, "--c0")], labels, "x", "t")
    shown = [t.text for t in drawn(svg, "text") if (t.text or "").startswith("layer")]
    assert 1 <= len(shown) <= charts.MOST_LABELS
    assert shown[0] == "layer0"


def test_bars_of_nothing() -> None:
    rects = drawn(bars([Series("a", [0, 0], "--c0")], ["0", "1"], "x", "t"), "rect")
    assert [float(r.get("height", 1)) for r in rects] == [0, 0]


def curve(by_score: bool = True) -> Curve:
    cuts = tuple(Cut(rule, i + 1, 10) for i, rule in enumerate(charts.RULE_LOOK))
    return Curve(tuple(float(10 - i) for i in range(10)), 4, cuts, by_score)


def test_a_line_for_each_rule_at_its_count() -> None:
    lines = drawn(score_curve(curve(), "t"), "line")
    kept, *rules = [float(line.get("x1", 0)) for line in lines]
    assert kept == pytest.approx(charts.LEFT + ROOM * 0.4, abs=0.1)
    assert rules == pytest.approx([charts.LEFT + ROOM * i / 10 for i in range(1, 6)], abs=0.1)
    styles = {line.get("style") for line in lines}
    assert len(styles) == 6  # each has a colour and a dash pattern of its own


def test_a_choice_by_another_score_marks_no_part() -> None:
    svg = score_curve(curve(by_score=False), "t")
    assert not drawn(svg, "polygon")
    assert len(drawn(svg, "line")) == 5
    assert drawn(score_curve(curve(), "t"), "polygon")


@pytest.mark.parametrize("scores", [(0.0,) * 4, (1.0,), (-1.0, -2.0), (2.0, -2.0)])
def test_odd_curves_stay_on_the_chart(scores: tuple[float, ...]) -> None:
    (line,) = drawn(score_curve(Curve(scores, 1, (), True), "t"), "polyline")
    for point in line.get("points", "").split():
        x, y = map(float, point.split(","))
        assert charts.LEFT <= x <= charts.WIDTH
        assert charts.TOP <= y <= charts.TOP + HIGH


def test_texts_are_escaped() -> None:
    svg = bars([Series("<b>", [1.0], "--c0")], ["<i>"], "<u>", '"<s>')
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert tree.fromstring(svg).get("aria-label") == '"<s>'


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0541, "0.0541"), (12, "12"), (999, "999"), (1500, "1.5k"), (2.5e6, "2.5M"),
     (7.03e9, "7.03G"), (3e12, "3T"), (0.00502, "5.0e-3"), (-1e-5, "-1.0e-5")],
)  # fmt: skip
def test_short_figures(value: float, text: str) -> None:
    assert short(value) == text
