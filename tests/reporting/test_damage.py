"""Damaged folders: a page, or one sentence that names the folder, never a stack trace."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from itprune.cli import main
from itprune.reporting.summary import summarise
from tests.reporting.folders import attempt, training
from tests.reporting.page import Page, written


def refusal(folder: Path) -> str:
    """Why there is no page of a folder; "none": there is one."""
    try:
        Page(written(folder))
    except ValueError as error:
        return str(error)
    return "none"


WRONG: tuple[Any, ...] = (
    None, 5, "x", [], {}, [5], [{}], {"a": 1}, True,
)  # fmt: skip


@pytest.mark.parametrize("key", sorted(attempt()))
def test_no_damaged_record_ends_in_a_stack_trace(tmp_path: Path, key: str) -> None:
    for number, value in enumerate(WRONG):
        folder = training(tmp_path / str(number), [attempt(**{key: value})])
        assert refusal(folder).startswith((f"{folder}: its run.json is damaged", "none"))


@pytest.mark.parametrize("key", sorted(attempt()["metrics"]))
def test_no_damaged_figure_ends_in_a_stack_trace(tmp_path: Path, key: str) -> None:
    for number, value in enumerate(WRONG):
        metrics = {**attempt()["metrics"], key: value}
        folder = training(tmp_path / str(number), [attempt(metrics=metrics)])
        assert refusal(folder).startswith((f"{folder}: its run.json is damaged", "none"))


@pytest.mark.parametrize("name", ["run.json", "trainer_state.json", "compare.json", "eval.json"])
@pytest.mark.parametrize(
    "text",
    ["{", "[]", "5", "\udcff", '{"attempts": 5, "log_history": 5, "rows": 5}', "[" * 100_000,
     '{"attempts": [5], "log_history": [5], "rows": [5]}',
     '{"attempts": [{}], "log_history": [[]], "rows": [{}]}'],
    ids=range(8),
)  # fmt: skip
def test_damaged_files_are_one_sentence_that_names_the_folder(
    tmp_path: Path, name: str, text: str
) -> None:
    folder = training(tmp_path / "a", attempts=[])
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: its {name}") as error:
        summarise([folder])
    assert "\n" not in str(error.value)


def test_wrong_values_of_a_log_are_passed_over(tmp_path: Path) -> None:
    log = [{"step": "x", "loss": []}, {"step": 1, "loss": 1.0, "eval_accuracy": "high"}]
    state = {"global_step": "y", "max_steps": None, "log_history": log}
    Page(written(training(tmp_path / "a", [], log=state)))


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 1.7e308, 5e-324, float("inf"), float("nan")]
)
def test_figures_no_axis_can_show_are_none(tmp_path: Path, value: float) -> None:
    log = [{"step": 1, "loss": value}, {"step": 2, "loss": 1.0}, {"step": value, "loss": 2.0}]
    state = {"global_step": value, "max_steps": value, "log_history": log}
    outcome = {"state": "finished", "step": value, "sentence": None}
    times = {**attempt()["metrics"], "step_time_s": value}
    text = written(
        training(tmp_path / "a", [], log=state),
        training(tmp_path / "b", [attempt(outcome=outcome, metrics=times)], log=state),
    )
    Page(text)
    assert not re.findall(r'="[^"]*(?:nan|inf|e\+)[^"]*"', text)


def test_a_budget_that_is_no_number_is_passed_over(tmp_path: Path) -> None:
    log = [{"step": 1, "loss": 1.0, "eval_accuracy_keep_1.2.3": 0.5}]
    state = {"global_step": 1, "max_steps": 1, "log_history": log}
    Page(written(training(tmp_path / "a", [], log=state)))


def test_texts_that_are_no_utf8_are_spelt_out(tmp_path: Path) -> None:
    outcome = {"state": "failed", "step": 1, "sentence": "half \ud800"}
    folder = training(
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff")), [attempt(outcome=outcome)]
    )
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "a\\udcff" in text
    assert "half \\ud800" in text
    assert sorted(tmp_path.iterdir()) == sorted([folder, page])
