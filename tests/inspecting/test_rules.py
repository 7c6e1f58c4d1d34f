"""Where rules cut a curve: their own counts, and what is said of a choice by another score."""

from __future__ import annotations

import pytest
import torch

from itprune.inspecting.rules import make_curve
from itprune.knee import RULES, inflection_count

SCORE = torch.tensor([0.1, 5.0, 0.2, 4.0, 0.0, 0.1, 0.3, 0.1])


def test_counts_are_those_of_the_rules() -> None:
    curve = make_curve(SCORE, SCORE > 1, None)
    group = torch.zeros(len(SCORE), dtype=torch.long)
    assert {cut.rule: cut.count for cut in curve.cuts} == {
        rule: int(inflection_count(SCORE, group, 1, rule)[0]) for rule in RULES
    }
    assert curve.kept == 2
    assert list(curve.scores) == sorted(SCORE.tolist(), reverse=True)
    assert curve.by_score


def test_topk_keeps_the_target() -> None:
    curve = make_curve(SCORE, SCORE > 1, 0.5)
    assert curve.cuts[-1].rule == "topk"
    assert curve.cuts[-1].count == 4
    assert curve.cuts[-1].share == 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_a_curve_without_a_bend_keeps_all_and_says_nothing(value: float) -> None:
    curve = make_curve(torch.full((5,), value), torch.ones(5, dtype=torch.bool), None)
    assert {cut.count for cut in curve.cuts} == {5}


def test_a_choice_by_another_score_is_told() -> None:
    assert not make_curve(SCORE, SCORE < 1, None).by_score
    assert make_curve(SCORE, torch.ones(8, dtype=torch.bool), None).by_score
    assert make_curve(SCORE, torch.zeros(8, dtype=torch.bool), None).by_score
