"""Damaged folders: a page, or one sentence that names the folder, never a stack trace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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
