"""The fingerprint of a run: whatever decides an answer or its score has another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from itprune.evaluating.questions import split
from itprune.evaluating.settings import Settings, fingerprint
from itprune.tasks import find_task
from tests.tasks.made import picture

RECORD = {"id": "1", "image": "a.png", "prompt": "Which?", "answer": "x"}
SAME = {"batch_size": 2, "max_bad": 0.5, "retry": True, "output": Path("elsewhere")}
OTHER = {"max_new_tokens": 3, "device": "cuda:1", "dtype": "bfloat16"}


def of(folder: Path, settings: dict[str, Any], record: dict[str, str], **options: str) -> str:
    """The fingerprint of one question on a model of one file."""
    picture(folder / "a.png")
    (folder / "data.json").write_text(json.dumps([record]))
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    task = find_task("records").read([folder / "data.json"], folder, options)
    known = replace(Settings(model, folder / "out"), **settings)
    return fingerprint(known, task, split(task, None, 0))


@pytest.mark.parametrize("name", SAME)
def test_what_decides_no_answer_does_not_count(tmp_path: Path, name: str) -> None:
    assert of(tmp_path, {}, RECORD) == of(tmp_path, {name: SAME[name]}, RECORD)


@pytest.mark.parametrize("name", OTHER)
def test_settings_that_decide_an_answer_count(tmp_path: Path, name: str) -> None:
    assert of(tmp_path, {}, RECORD) != of(tmp_path, {name: OTHER[name]}, RECORD)


@pytest.mark.parametrize("name", ["id", "prompt", "answer"])
def test_data_counts(tmp_path: Path, name: str) -> None:
    assert of(tmp_path, {}, RECORD) != of(tmp_path, {}, RECORD | {name: "y"})


def test_options_of_the_task_count(tmp_path: Path) -> None:
    plain, scored = of(tmp_path, {}, RECORD), of(tmp_path, {}, RECORD, metric="anls")
    assert len({plain, scored, of(tmp_path, {}, RECORD, instruction="Be short.")}) == 3


def test_references_count_where_the_question_does_not_hold_them(tmp_path: Path) -> None:
    """Most benchmarks keep right answers apart from what is asked."""
    picture(tmp_path / "1.jpg")
    (tmp_path / "model").mkdir()
    settings, found = Settings(tmp_path / "model", tmp_path), set()
    for answer in ("yes", "no"):
        entry = {"imageId": "1", "question": "Is it?", "answer": answer, "types": {}}
        (tmp_path / "gqa.json").write_text(json.dumps({"1": entry}))
        task = find_task("gqa").read([tmp_path / "gqa.json"], tmp_path, {})
        found.add(fingerprint(settings, task, split(task, None, 0)))
    assert len(found) == 2


def test_one_gpu_is_as_good_as_another(tmp_path: Path) -> None:
    assert of(tmp_path, {"device": "cuda:0"}, RECORD) == of(tmp_path, {"device": "cuda:1"}, RECORD)
