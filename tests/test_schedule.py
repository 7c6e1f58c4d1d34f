"""Schedules and their averages, both ways."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itprune.maths.schedule import (
    bend_stages,
    check_schedule,
    drops,
    fit_schedule,
    schedule_average,
    segment_lengths,
    sigmoid_midpoint,
    sigmoid_schedule,
    stage_average,
)

DEPTHS = st.integers(2, 48)
KEEPS = st.floats(0.001, 1.0)
SLOPES = st.floats(0.01, 60.0)


def falling(schedule: tuple[float, ...]) -> bool:
    return all(0 <= b <= a <= 1 for a, b in pairwise(schedule))


@given(DEPTHS, KEEPS, SLOPES)
def test_a_sigmoid_averages_keep_and_never_rises(depth: int, keep: float, slope: float) -> None:
    keep = max(keep, 1 / depth)
    schedule = sigmoid_schedule(slope, keep, depth, "p_sigmoid")
    assert len(schedule) == depth
    assert schedule[0] == 1
    assert falling(schedule)
    assert schedule_average(schedule) == pytest.approx(keep, abs=1e-7)


@pytest.mark.parametrize(
    ("average", "slope", "expected"),
    [
        (0.125, 0.3, 2.806),
        (0.125, 1.0, 3.982),
        (0.25, 0.3, 7.685),
        (0.5, 0.7, 16.0),
        (0.125, 0.1, -6.47),
    ],
)
def test_the_midpoint_in_closed_form(average: float, slope: float, expected: float) -> None:
    midpoint = sigmoid_midpoint(slope, average, 32)
    assert midpoint == pytest.approx(expected, abs=5e-3)
    values = [1 / (1 + math.exp(slope * (i + 0.5 - midpoint))) for i in range(32)]
    assert schedule_average(values) == pytest.approx(average, abs=5e-3)


@pytest.mark.parametrize("slope", [1e-320, 1e-12, 1e12, 1e308])
def test_any_slope_averages_keep(slope: float) -> None:
    values = sigmoid_schedule(slope, 0.3, 32, "p_sigmoid")
    assert schedule_average(values) == pytest.approx(0.3, abs=1e-6 if slope < 1 else 0.5 / 32)


def test_the_midpoint_does_not_overflow() -> None:
    assert sigmoid_midpoint(1e308, 0.25, 100) == pytest.approx(25)
    assert sigmoid_midpoint(60.0, 0.5, 100) == pytest.approx(50)
    assert sigmoid_midpoint(0.3, 0.0, 32) == -math.inf
    assert sigmoid_midpoint(0.3, 1.0, 32) == math.inf


@given(st.lists(st.floats(0, 1), min_size=1, max_size=31), KEEPS)
def test_fitting_meets_keep_and_keeps_the_order(values: list[float], keep: float) -> None:
    schedule = (1.0, *sorted(values, reverse=True))
    keep = max(keep, 1 / len(schedule))
    fitted = fit_schedule(schedule, keep, "gsearch")
    assert fitted[0] == 1
    assert falling(fitted)
    assert schedule_average(fitted) == pytest.approx(keep, abs=1e-7)


@given(
    st.integers(3, 48).flatmap(
        lambda depth: st.tuples(
            st.just(depth),
            st.lists(st.integers(0, depth - 2), min_size=1, max_size=4, unique=True),
        )
    ),
    KEEPS,
)
def test_bent_stages_average_keep(case: tuple[int, list[int]], keep: float) -> None:
    depth, layers = case[0], tuple(sorted(case[1]))
    keep = max(keep, (layers[0] + 1) / depth)
    base = tuple(0.5 ** (i + 1) for i in range(len(layers)))
    fractions = bend_stages(base, layers, depth, keep, "pyramiddrop")
    assert falling((1.0, *fractions))
    assert stage_average(fractions, layers, depth) == pytest.approx(keep, abs=1e-7)


def test_what_is_out_of_reach_is_said_with_the_lowest_keep() -> None:
    with pytest.raises(ValueError, match=r"fastv, whose first 3 of 32 .* reach is 0\.0938$"):
        bend_stages((0.5,), (2,), 32, 0.05, "fastv")
    assert bend_stages((0.5,), (2,), 32, 3 / 32, "fastv") == (0.0,)
    with pytest.raises(ValueError, match=r"reach is 0\.25"):
        sigmoid_schedule(1.0, 0.2, 4, "p_sigmoid")
    with pytest.raises(ValueError, match=r"reach is 0\.25"):
        fit_schedule((1.0, 0.5, 0.5, 0.0), 0.2, "gsearch")


def test_lengths_averages_and_drops() -> None:
    assert segment_lengths((1, 3, 5), 8) == (2, 2, 2, 2)
    assert stage_average((0.5, 0.25, 0.125), (1, 3, 5), 8) == 1.875 / 4
    assert drops((1.0, 1.0, 0.5, 0.5, 0.0)) == {1: 0.5, 3: 0.0}


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        ((1.0, 0.5), "one fraction for each of the 3 LLM layers, got 2"),
        ((1.0, 0.2, 0.5), "must not rise.*0.5 at layer 2 follows 0.2"),
        ((1.0, 0.5, -0.1), "fractions from 0 to 1, got -0.1 at layer 2"),
        ((1.0, math.nan, 0.1), "fractions from 0 to 1, got nan at layer 1"),
        ((0.9, 0.5, 0.1), "must start with 1"),
    ],
)
def test_a_bad_schedule_is_refused(schedule: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^prune.schedule: .*{sentence}"):
        check_schedule("prune.schedule", schedule, 3)
