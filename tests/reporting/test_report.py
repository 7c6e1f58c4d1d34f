"""`itprune report`: what is read, what is told, and that a page holds nothing but itself."""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import report as command
from itprune.reporting.charts import POINTS, charts, smoothed, thinned
from itprune.reporting.metrics import metrics_of
from itprune.reporting.render import facts
from itprune.reporting.summary import Summary, accuracies, names_of, summarise, wilson
from itprune.reporting.svg import HEIGHT, Frame, Look, cut, labels, powers, ticks
from tests.reporting.folders import attempt, comparison, evaluation, history, row, training
from tests.reporting.page import Page, written


def start(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", *words])
    return int(args.run(args))


def told(summary: Summary) -> dict[str, list[str]]:
    return {name: [cell.text for cell in cells] for name, cells in facts(summary)}


# ------------------------------------------------------------------------------- figures
def test_a_log_in_a_few_numbers() -> None:
    log = [
        {"step": 1, "loss": 3.0, "step_time": 9.0, "peak_mb": 900.0},
        {"step": 2, "loss": 1.0, "step_time": 0.2, "tokens_per_s": 10, "peak_mb": 5.0},
        {"step": 2, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_accuracy_keep_0.22": 0.25},
        {"step": 3, "loss": 2.0, "step_time": 0.4, "tokens_per_s": 30, "peak_mb": 7.0},
        {"step": 3, "eval_loss": 2.5, "eval_accuracy": 0.4, "eval_runtime": 3.0},
        {"step": 4, "loss": float("nan"), "step_time": "x"},
        {"train_loss": 1.0},
    ]
    assert metrics_of(log, since=1) == {
        "loss": {"last": 2.0, "best": 1.0},
        "eval": {
            "loss": {"last": 2.5, "best": 2.0},
            "accuracy": {"last": 0.4, "best": 0.5},
            "accuracy_keep_0.22": {"last": 0.25, "best": 0.25},
        },
        "step_time_s": 0.3,
        "tokens_per_s": 20.0,
        "peak_mb": 7.0,
    }
    assert metrics_of([]) == {
        "loss": None, "eval": {}, "step_time_s": None, "tokens_per_s": None, "peak_mb": None,
    }  # fmt: skip


def test_wilsons_interval() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson(0.0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(0.5, None) == (None, None)


# ------------------------------------------------------------------------------- what is told
def test_a_recorded_run_is_told(tmp_path: Path) -> None:
    summary = summarise([training(tmp_path / "a")])
    assert told(summary) == {
        "outcome": ["finished"],
        "method": ["itprune"],
        "keep": ["0.22"],
        "steps": ["30 of 30"],
        "attempts": ["1"],
        "last loss": ["0.5000 (best 0.4000)"],
        "evaluation loss": ["0.6000 (best 0.5500)"],
        "accuracy": ["50.0 % at keep 0.22\n75.0 % at keep 1"],
        "step time, median": ["0.25 s"],
        "tokens per second": ["1,234"],
        "largest memory": ["800 MB"],
        "training samples": ["24"],
        "commit": ["aaaaaaaa"],
        "device": ["cpu"],
        "launcher": ["python"],
        "processes": ["1"],
        "started": ["2030-01-02 03:04 UTC"],
        "ended": ["2030-01-02 03:05 UTC"],
        "training data": summary.prints,
    }


def test_a_run_without_a_record_is_told_by_its_log(tmp_path: Path) -> None:
    folder = training(tmp_path / "a", attempts=[])
    rows = told(summarise([folder]))
    assert rows["steps"] == ["30 of 30"]
    assert rows["largest memory"] == ["530 MB"]
    assert "outcome" not in rows
    (folder / "recipe.yaml").write_text("prune: {method: fastv, keep: {from: 1.0, to: 0.5}}\n")
    rows = told(summarise([folder]))
    assert (rows["method"], rows["keep"]) == (["fastv"], ["1.0 to 0.5"])


def test_a_killed_run_is_told_by_its_newest_checkpoint(tmp_path: Path) -> None:
    lost = attempt(
        outcome={"state": "running", "step": 4, "sentence": None},
        ended=None,
        metrics=metrics_of([]),
        data=None,
    )
    folder = training(tmp_path / "a", [lost], steps=3)
    for step in (10, 9):
        state = {"global_step": step, "max_steps": 30, "log_history": history(step)}
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "checkpoint-11").mkdir()
    (folder / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11')
    rows = told(summarise([folder]))
    assert rows["steps"] == ["10 of 30"]
    assert rows["outcome"] == ["running, or killed: last heard of 2030-01-02 03:05 UTC"]
    assert rows["largest memory"] == ["510 MB"]
    assert "accuracy" not in rows


def test_what_differs_is_flagged(tmp_path: Path) -> None:
    other = attempt(
        recipe={**attempt()["recipe"], "prune": None, "lora": {"r": 4, "target": ["q"]},
                "trainer": {"output_dir": "p", "max_steps": 30}},
        data={"train": [{"name": "d.json", "bytes": 3, "sha256": "cd" * 32, "of": "x"}]},
        versions={"itprune": "0.1.0", "torch": "2.11.0"},
        git={"project": {"commit": "b" * 40, "dirty": True}, "working_directory": None},
        outcome={"state": "failed", "step": 7, "sentence": "the disk is full"},
    )  # fmt: skip
    copied = attempt(
        data={"train": [{"name": "x/d.json", "bytes": 3, "sha256": "ab" * 32, "of": "x"}]}
    )
    summary = summarise(
        [
            training(tmp_path / "a"),
            training(tmp_path / "b", [other]),
            training(tmp_path / "c", [copied]),
        ]
    )
    assert summary.recipe == {
        "prune.method": ["itprune", None, "itprune"],
        "prune.keep": ["0.22", None, "0.22"],
        "prune": [None, "null", None],
        "lora.r": [None, "4", None],
        "lora.target": [None, '["q"]', None],
    }
    assert summary.surroundings == {"versions.torch": ["2.13.0", "2.11.0", "2.13.0"]}
    assert "train: d.json" in summary.files
    rows = dict(facts(summary))
    first, second, third = rows["training data"]
    assert first == third
    assert second.wrong
    assert second.text.endswith("other data than a")
    assert [cell.text for cell in rows["outcome"]] == [
        "finished", "failed: the disk is full", "finished",
    ]  # fmt: skip
    assert [cell.wrong for cell in rows["outcome"]] == [False, True, False]
    assert rows["commit"][1].text == "bbbbbbbb, changed since"
    assert rows["keep"][1].text == "all tokens"


def test_same_runs_differ_in_nothing(tmp_path: Path) -> None:
    summary = summarise([training(tmp_path / "a"), training(tmp_path / "b")])
    assert (summary.recipe, summary.surroundings, summary.files) == ({}, {}, [])


@pytest.mark.parametrize(
    ("keep", "at"),
    [(0.3, [0.3]), ({"from": 1.0, "to": 0.2}, [0.2]), ([0.4, 0.1], [0.4]), (None, [])],
)
def test_evaluations_without_a_budget_have_that_in_force(
    tmp_path: Path, keep: Any, at: list[float]
) -> None:
    recipe = {**attempt()["recipe"], "prune": {"method": "itprune", "keep": keep}}
    metrics = {**attempt()["metrics"], "eval": {"accuracy": {"last": 0.5, "best": 0.5}}}
    folder = training(tmp_path / "a", [attempt(recipe=recipe, metrics=metrics)])
    assert [one["keep"] for one in accuracies(summarise([folder]).runs["a"])] == at


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert names_of([tmp_path / "a/run", tmp_path / "b/walk"]) == ["run", "walk"]
    with pytest.raises(ValueError, match=r"/a: is given twice"):
        names_of([tmp_path / "a", Path(f"{tmp_path}/a/../a")])


# ------------------------------------------------------------------------------- the page
def test_a_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    text = written(
        training(tmp_path / "a"), training(tmp_path / "b"), comparison(tmp_path / "cmp"),
        evaluation(tmp_path / "ev"),
    )  # fmt: skip
    found = Page(text)
    assert found.tags.count("figure") == 7
    for words in ("Training loss", "Accuracy over keep, last evaluation", "cmp: val.json",
                  "ev: pope", "ev: mme", "Time of a step, median"):  # fmt: skip
        assert words in found.texts
    assert {"80.0", "70.0 to 90.0", "1500.0"} <= set(found.texts)
    assert not re.search(r"(src|href)=(?!\"data:)", text)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "script" not in found.tags
    assert "NaN" not in text
    assert "inf" not in re.findall(r'[xyd]\d?="([^"]*)"', text)


def test_html_in_names_is_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    recipe = {**attempt()["recipe"], "prune": {"method": evil, "keep": evil}}
    outcome = {"state": "failed", "step": 1, "sentence": evil}
    first = training(tmp_path / "<b>one", [attempt(recipe=recipe, outcome=outcome)])
    head = {"model": evil, "data": evil, "metric": evil,
            "rows": [row(evil, 1.0, 0.5)]}  # fmt: skip
    scores = tmp_path / "s"
    scores.mkdir()
    (scores / "compare.json").write_text(json.dumps(head))
    data = {"train": [{"name": evil, "bytes": 1, "sha256": evil, "of": evil}]}
    text = written(first, training(tmp_path / "two", [attempt(data=data)]), scores)
    found = Page(text)
    assert not {"img", "b"} & set(found.tags)
    assert sum(evil in words for words in found.texts) >= 6
    assert "<b>one" in found.texts


def test_the_record_says_what_is_a_share(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    line = row("dense", 1.0, 0.7, "value") | {"points": 1.0}
    head = {"task": "mine", "metric": "points", "share": False, "model": "m", "rows": [line]}
    (folder / "eval.json").write_text(json.dumps({"runs": [head]}))
    texts = Page(written(folder)).texts
    assert {"points", "0.7"} <= set(texts)
    assert "70.0" not in texts


def test_one_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    Page(written(training(tmp_path / "a", attempts=[], steps=1)))
    empty = {"global_step": 0, "max_steps": 0, "log_history": []}
    assert "figure" not in Page(written(training(tmp_path / "b", attempts=[], log=empty))).tags


def test_scores_that_are_all_nothing_have_an_axis_of_shares(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    rows = [row("dense", 1.0, 0.0) | {"low": 0.0, "high": 0.0}]
    (tmp_path / "s" / "compare.json").write_text(
        json.dumps({"model": "m", "data": "/far/away/val.json", "rows": rows})
    )
    (picture,) = charts(summarise([tmp_path / "s"]))
    assert picture.title == "s: val.json"
    assert "0.5 %" in picture.picture
    assert "-" not in "".join(re.findall(r">([^<]* %)<", picture.picture))


def test_scores_keep_their_best_methods_in_the_picture(tmp_path: Path) -> None:
    rows = [row("dense", 1.0, 0.9), row("random", 0.2, 0.1)]
    rows += [row(f"m{i}", 0.2, 0.3 + i / 100) for i in range(12)]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "compare.json").write_text(
        json.dumps({"model": "m", "data": "d", "rows": rows})
    )
    (picture,) = charts(summarise([tmp_path / "s"]))
    names = [name for _, name in picture.legend]
    assert names == ["dense", "random", "m11", "m10", "m9", "m8", "m7", "m6"]
    assert "6 further method(s)" in picture.note


def test_controls_look_alike_in_all_pictures(tmp_path: Path) -> None:
    found = []
    for name, values in (("a", (0.9, 0.1)), ("b", (0.1, 0.9))):
        (tmp_path / name).mkdir()
        rows = [row("m", 0.2, 0.5), *map(row, ("random", "dense"), (0.2, 1.0), values)]
        head = {"model": "m", "data": "d", "rows": rows}
        (tmp_path / name / "compare.json").write_text(json.dumps(head))
        (picture,) = charts(summarise([tmp_path / name]))
        found.append([method for _, method in picture.legend])
    assert found == [["dense", "random", "m"]] * 2


def test_points_stand_where_their_values_are() -> None:
    frame = Frame((0.0, 10.0), (0.0, 1.0))
    left, bottom = frame.place(0, 0)
    right, top = frame.place(10, 1)
    assert frame.place(5, 0.5) == ((left + right) / 2, (bottom + top) / 2)
    assert left < right
    assert top < bottom
    rising = Frame.around([0.0, 1.0], [0.1, 10.0], log=True)
    assert rising.place(0, 1.0)[1] == pytest.approx((bottom + top) / 2, abs=1)
    assert powers(*rising.y) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert not Frame.around([0.0], [0.0, 10.0], log=True).log
    assert not Frame.around([0.0], [2.0, 10.0], log=True).log
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.11, 1.0) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert Frame.around([3.0], [0.0]) == Frame((2.7, 3.3), (-1.0, 1.0))


def test_labels_do_not_cover_each_other() -> None:
    ends = [(f"run {i}", Look(i), 100.0, 280.0) for i in range(6)]
    places = sorted(float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"', labels(ends)))
    assert all(b - a >= 12.9 for a, b in pairwise(places))
    assert places[-1] < HEIGHT
    assert cut("a-very-long-name-of-a-run") == "a-ver…a-run"
    assert [Look(0).colour, Look(0).dash] != [Look(6).colour, Look(6).dash]


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[5_001] = (5_001.0, 9.0)
    found = thinned(points)
    assert len(found) <= 2 * POINTS
    assert (5_001.0, 9.0) in found
    assert found[-1] == points[-1]
    assert found == sorted(found)
    assert smoothed([(0.0, 1.0), (1.0, 3.0)]) == [(0.0, 1.0), (1.0, 3.0)]
    flat = smoothed([(float(x), float(x % 2)) for x in range(400)])
    assert all(abs(y - 0.5) < 0.05 for _, y in flat[20:-20])


# ------------------------------------------------------------------------------- the command
def test_the_command_writes_a_page_and_prints_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, c, e = training(tmp_path / "a"), comparison(tmp_path / "c"), evaluation(tmp_path / "e")
    page = tmp_path / "deep" / "report.html"
    assert start(str(a), str(c), "--output", str(page), "--title", "<x>") == 0
    assert capsys.readouterr().out == f"{page}: 1 run(s), 1 folder(s) of scores\n"
    assert "<title>&lt;x&gt;</title>" in page.read_text()
    assert not list(page.parent.glob(".report*"))
    assert start(str(a), str(c), str(e), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["metrics"]["loss"] == {"last": 0.5, "best": 0.4}
    assert found["runs"][0]["accuracy"][1]["accuracy"] == 0.75
    assert [one["metric"] for one in found["scores"]] == ["accuracy", "f1", "mme_score"]
    assert found["scores"][0]["scores"][4]["value"] is None
    assert set(found["differences"]) == {"recipe", "surroundings", "data_files"}


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    a = str(training(tmp_path / "a"))
    for words, sentence in (
        ((a,), "give --output FILE.html"),
        ((a, "--output", f"{a}/run.json"), "must end in .html"),
        ((f"{tmp_path}/none", "--json"), "none: no such folder"),
        ((str(tmp_path), "--json"), "is no run: it holds neither run.json"),
        ((a, a, "--json"), "a: is given twice"),
        ((a, "--output", f"{a}/run.json/x.html"), "cannot be written"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)) as error:
            start(*words)
        assert "\n" not in str(error.value)
    (tmp_path / "dir.html").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        start(a, "--output", f"{tmp_path}/dir.html")
    assert not list(tmp_path.glob(".dir*"))
