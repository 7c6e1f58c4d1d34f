"""Oracle 9: properties every inflection rule must have, and what each does on known curves."""

from __future__ import annotations

import warnings

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itprune.knee import RULES, inflection_count
from itprune.ragged import top_per_group

CURVES = arrays.arrays(
    "float32", st.integers(1, 60), elements=st.integers(0, 1000).map(lambda x: x / 1000)
)
pytestmark = pytest.mark.filterwarnings("ignore:a score curve")


def count(scores: torch.Tensor, rule: str) -> int:
    group = torch.zeros(len(scores), dtype=torch.long)
    return int(inflection_count(scores, group, 1, rule))


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(values=CURVES, data=st.data())
def test_order_and_scale_do_not_matter(rule: str, values, data) -> None:
    scores = torch.from_numpy(values.copy())
    n = count(scores, rule)
    assert 1 <= n <= len(scores)
    order = data.draw(st.permutations(range(len(scores))))
    assert count(scores[list(order)], rule) == n
    assert count(scores * 2.0 ** data.draw(st.integers(-8, 8)), rule) == n


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30, deadline=None)
@given(curves=st.lists(CURVES, min_size=1, max_size=4))
def test_a_group_is_counted_as_if_alone(rule: str, curves) -> None:
    parts = [torch.from_numpy(c.copy()) for c in curves]
    if rule == "derivative":  # its default window depends on the longest group; name it
        alone = [
            int(inflection_count(p, torch.zeros(len(p), dtype=torch.long), 1, rule, 3))
            for p in parts
        ]
        window = 3
    else:
        alone, window = [count(p, rule) for p in parts], None
    group = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(list(map(len, parts))))
    together = inflection_count(torch.cat(parts), group, len(parts), rule, window)
    assert together.tolist() == alone


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "scores",
    [
        torch.ones(7),
        torch.zeros(5),
        torch.tensor([0.1, float("nan"), 0.3]),
        torch.tensor([0.1, float("inf"), 0.3]),
        torch.tensor([0.4]),
    ],
)
def test_a_curve_without_a_bend_keeps_everything(rule: str, scores: torch.Tensor) -> None:
    assert count(scores, rule) == len(scores)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_scores_count_like_their_float32_values(rule: str) -> None:
    scores = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 4
    half = scores.bfloat16()
    assert count(half, rule) == count(half.float(), rule)


def long_tail(n: int = 576, power: float = 1.2) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float32) ** -power


def test_known_curves() -> None:
    step = torch.tensor([1.0] * 10 + [0.0] * 90)
    assert count(step, "mean") == 10
    assert count(step, "chord") == 10
    assert count(step, "iqr") == 10
    tail = long_tail()
    assert count(tail, "mean") == int((tail > tail.mean()).sum())
    assert count(tail, "chord") < count(tail, "mean") < 576 * 0.4


def test_a_mean_count_is_the_knee_of_the_cumulative_curve() -> None:
    scores = torch.rand(200, generator=torch.Generator().manual_seed(1)).double() ** 3
    ordered = scores.sort(descending=True).values
    rise = ordered.cumsum(0) - torch.arange(1, 201) * ordered.mean()
    assert count(scores, "mean") == int(rise.argmax()) + 1


def test_ties_go_to_the_earlier_token() -> None:
    score = torch.tensor([0.5, 0.5, 0.5, 0.9, 0.5, 0.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    keep = top_per_group(score, group, torch.tensor([2, 1]))
    assert keep.tolist() == [True, False, False, True, True, False]


def test_the_warning_comes_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            count(torch.ones(4), "mean")
    assert len(caught) <= 1
