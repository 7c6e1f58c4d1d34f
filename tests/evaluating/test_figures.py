"""Bootstrap, lines and tables, on scores worked out by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from itprune.comparing.curves import looks_of, matplotlib_figure, panel
from itprune.comparing.entries import Case, Entry
from itprune.comparing.scoring import DRAWS, bounds, interval
from itprune.evaluating.bootstrap import TOTALLED, Draws
from itprune.evaluating.plot import draw_pareto
from itprune.evaluating.runs import Run, all_runs, put_run
from itprune.evaluating.summary import FIELDS, Answered, costs_of, summarise, timing_of
from itprune.evaluating.tables import section, write_tables
from itprune.tasks.base import Item, Task


class Plain(Task):
    """Scores that are averaged."""

    name, needs, metric = "plain", "nothing", "accuracy"

    def read_items(self) -> list[Item]:
        return []

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return {"score": float(answer in item.references)}


class Points(Plain):
    """100 points for every pair both of whose questions are right: no mean of scores."""

    name, metric = "points", "points"

    def total(
        self, items: Sequence[Item], scores: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        right: dict[str, bool] = {}
        for item, score in zip(items, scores, strict=True):
            pair = self.group(item)
            right[pair] = right.get(pair, True) and score["score"] == 1
        return {"points": 100.0 * sum(right.values()), "pairs": float(len(right))}

    def group(self, item: Item) -> str:
        return item.id[:-1]


def make(kind: type[Plain], names: Sequence[str]) -> tuple[Plain, list[Item]]:
    task = kind([Path("none")], Path(), {})
    items = [Item(name, {"prompt": "?"}, ("yes",), "odd|kind" if "1" in name else "even")
             for name in names]  # fmt: skip
    return task, items


def scores(*values: float) -> list[dict[str, float]]:
    return [{"score": value} for value in values]


def record(seconds: float, batch: int = 4, visual: int = 10) -> dict[str, Any]:
    return {
        "visual_in": 2 * visual, "visual_llm": visual, "layer_average": 0.5, "kv_entries": 30,
        "kv_bytes": 60, "tokens_out": 2, "batch": batch, "seconds": seconds, "clock": "s",
    }  # fmt: skip


def case(label: str, keep: float, seed: int | None = None) -> Case:
    return Case(Entry.parse(label), keep, seed)


# ------------------------------------------------------------------------------------ bootstrap
def test_a_mean_has_the_interval_of_the_comparison() -> None:
    task, items = make(Plain, [f"a{i}" for i in range(20)])
    values = [float(i % 3 == 0) for i in range(20)]
    draws = Draws(task, items)
    assert draws.is_mean
    assert draws.count == DRAWS
    assert bounds(draws.figures(scores(*values))) == interval(values)


def test_two_cases_are_drawn_on_the_same_questions() -> None:
    task, items = make(Plain, [f"a{i}" for i in range(8)])
    draws = Draws(task, items)
    ours = draws.figures(scores(1, 0, 1, 0, 1, 0, 1, 0))
    theirs = draws.figures(scores(0, 1, 0, 1, 0, 1, 0, 1))
    assert torch.allclose(ours + theirs, torch.ones(DRAWS, dtype=torch.float64))


def test_a_group_is_drawn_as_one() -> None:
    names = [f"{pair}{half}" for pair in "abcdef" for half in "12"]
    task, items = make(Points, names)
    draws = Draws(task, items)
    assert not draws.is_mean
    assert draws.count == TOTALLED
    # Three of six pairs are right: a draw's points are 100 times the right pairs drawn, each once.
    figures = draws.figures(scores(1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1))
    assert set(figures.tolist()) <= {0.0, 100.0, 200.0, 300.0}
    assert torch.equal(figures, draws.figures(scores(1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1)))
    right = draws.figures(scores(*[1.0] * 12))
    assert right.max() == 600
    assert right.min() < 500  # pairs that are not drawn


def test_a_mean_over_groups_is_drawn_by_groups() -> None:
    class Pairs(Plain):
        def group(self, item: Item) -> str:
            return item.id[:-1]

    task, items = make(Pairs, ["a1", "a2", "b1", "b2"])
    draws = Draws(task, items)
    assert not draws.is_mean
    # Pairs that are right or wrong together leave only 0, a half and 1.
    assert set(draws.figures(scores(1, 1, 0, 0)).tolist()) == {0.0, 0.5, 1.0}
    # A pair that is drawn twice counts twice: two thirds of three pairs can be one and the same.
    task, items = make(Pairs, ["a1", "a2", "b1", "b2", "c1", "c2"])
    figures = Draws(task, items).figures(scores(1, 1, 0, 0, 0, 0))
    assert {round(value, 3) for value in figures.tolist()} == {0.0, 0.333, 0.667, 1.0}


def test_the_difference_to_dense_is_paired() -> None:
    task, items = make(Plain, [f"a{i}" for i in range(20)])
    dense, other = scores(*[1.0, 0.0] * 10), scores(*[1.0, 0.0] * 9, 0.0, 0.0)
    costs = costs_of([record(0.1)] * 20)
    answered = [
        Answered(case("dense", 1.0), costs, "s", dense),
        Answered(case("visionzip", 0.2), costs, "s", dense),
        Answered(case("uniform", 0.2), costs, "s", other),
    ]
    _, same, worse = summarise(task, items, answered)
    assert (same["difference_low"], same["difference_high"]) == (0.0, 0.0)
    # They differ in one question of twenty, which is drawn three times at most in 95 %.
    assert worse["difference_high"] == 0.0
    assert worse["difference_low"] == pytest.approx(-0.15)
    assert worse["high"] - worse["low"] > 0.3


# ------------------------------------------------------------------------------------ lines
def test_costs_are_means_and_seconds_those_of_full_batches() -> None:
    # Four full batches' worth of 0.1 s an answer, and a last batch of one that was slow.
    records = [*(record(0.1) for _ in range(4)), record(5.0, batch=1, visual=20)]
    costs = costs_of(records)
    assert costs["answers_per_s"] == pytest.approx(10)
    assert costs["visual_llm"] == (4 * 10 + 20) / 5
    assert costs["kv_entries"] == 30
    assert timing_of(records) == "s, batches of 4"
    blind = costs_of([{**record(0.1), "visual_in": 0, "layer_average": None}])
    assert "layer_average" not in blind


def lines_of(task: Plain, items: Sequence[Item]) -> list[dict[str, Any]]:
    dense = (costs_of([record(0.1, visual=20)] * 4), "s, batches of 4")
    short, other = (costs_of([record(0.05)] * 4), dense[1]), (costs_of([record(0.05)] * 4), "min")
    return summarise(
        task,
        items,
        [
            Answered(case("visionzip", 0.2), *other, scores(1, 1, 0, 1)),
            Answered(case("fastv", 0.2), reason="prune.keep: out of | reach"),
            Answered(case("random", 0.2, 0), *short, scores(1, 0, 0, 0)),
            Answered(case("random", 0.2, 1), *short, scores(1, 1, 0, 0)),
            Answered(case("dense", 1.0), *dense, scores(1, 1, 1, 0)),
        ],
    )


def test_seeds_are_joined_and_all_is_set_against_dense() -> None:
    task, items = make(Plain, ["a1", "b1", "c2", "d2"])
    lines = lines_of(task, items)
    assert [line["method"] for line in lines] == ["dense", "random", "visionzip", "fastv"]
    assert all(line.keys() == FIELDS.keys() for line in lines)
    dense, chance, zipped, left_out = lines
    assert dense["value"] == 0.75
    assert chance["seeds"] == 2
    assert chance["value"] == (0.25 + 0.5) / 2
    assert chance["difference"] == -0.375
    assert chance["ratio"] == 0.5
    assert chance["visual_llm_ratio"] == 0.5
    assert chance["speedup"] == pytest.approx(2)
    assert zipped["speedup"] is None  # measured otherwise than dense
    assert zipped["difference"] == 0.0
    assert zipped["difference_low"] < 0 < zipped["difference_high"]
    # Of visionzip's even questions one of two is right, as of dense's; of the odd both, as dense's.
    assert zipped["kinds"]["odd|kind"] == {"items": 2, "value": 1.0, "difference": 0.0}
    assert zipped["kinds"]["even"] == {"items": 2, "value": 0.5, "difference": 0.0}
    assert left_out["reason"] == "prune.keep: out of | reach"
    assert left_out["value"] is None
    assert left_out["seeds"] == 0


# ------------------------------------------------------------------------------------ files
HEAD = {
    "run": "0123", "task": "plain", "metric": "accuracy", "share": True, "model": "m",
    "data": ["d.json"], "items": 4, "calibration": 1,
    "bad": [{"id": "x", "error": "sample x:\nunreadable | image"}],
    "draws": 2000, "batch_size": 4, "versions": {"torch": "2"},
    "machine": {"device": "cpu", "processor": "p"},
}  # fmt: skip


def test_tables_say_all_and_survive_odd_names(tmp_path: Path) -> None:
    task, items = make(Plain, ["a1", "b1", "c2", "d2"])
    run = Run(HEAD, lines_of(task, items))
    assert run.percent
    write_tables(tmp_path, [run])
    text = (tmp_path / "eval.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    columns = {line.replace("\\|", "").count("|") for line in table}
    assert columns == {11, 5}  # the table, and the kinds
    assert "out of \\| reach" in text
    assert "odd\\|kind (2)" in text
    assert "- sample x: unreadable \\| image" in text
    assert "75.0" in text
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["fields"].keys() == record["runs"][0]["rows"][0].keys()
    with (tmp_path / "eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows if row["method"] == "dense"] == ["0.75", "0.5", "1.0"]
    draw_pareto([run], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_points_are_no_percentage(tmp_path: Path) -> None:
    task, items = make(Points, ["a1", "a2", "b1", "b2"])
    run = Run({**HEAD, "metric": "points", "share": False}, lines_of(task, items))
    assert not run.percent
    text = "\n".join(section(run))
    assert "| points" in text
    assert "100.0" in text
    assert "All figures:" in text
    assert "| pairs" in text
    draw_pareto([run], tmp_path / "pareto.png")


def test_names_are_joined_to_the_points_furthest_right() -> None:
    axis = matplotlib_figure()().subplots()
    point = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    curves = {"m": [{**point, "per_s": 9.0}, {**point, "per_s": 5.0}]}
    panel(axis, curves, looks_of(curves), {**point, "per_s": 2.0}, "per_s", "answers per second")
    starts = [line.get_xdata()[0] for line in axis.lines if not line.get_clip_on()]
    assert starts[0] == pytest.approx(9 / axis.get_xlim()[1])


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_pareto([Run(HEAD, [])], tmp_path / "pareto.png")


def test_later_lines_join_a_run_and_replace_their_like(tmp_path: Path) -> None:
    folder = tmp_path / "answers" / "plain-0123"
    folder.mkdir(parents=True)
    task, items = make(Plain, ["a1", "b1", "c2", "d2"])
    lines = lines_of(task, items)
    put_run(folder, Run(HEAD, lines[:2]))
    put_run(folder, Run(HEAD, [lines[0], {**lines[2], "value": 0.9}]))
    (run,) = all_runs(tmp_path)
    assert [line["method"] for line in run.lines] == ["dense", "random", "visionzip"]
    assert run.lines[2]["value"] == 0.9
    put_run(folder, Run({**HEAD, "items": 3}, lines[:1]))  # other questions count now
    (run,) = all_runs(tmp_path)
    assert [line["method"] for line in run.lines] == ["dense"]
    without = {name: value for name, value in run.to_dict().items() if name != "share"}
    for other in ("[]", json.dumps(without)):
        (folder / "summary.json").write_text(other)
        with pytest.raises(ValueError, match="not a summary of `itprune eval`"):
            all_runs(tmp_path)
