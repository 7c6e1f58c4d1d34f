"""GQA: exact match, kinds of questions, the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .made import json_file, picture, read, refused, total

ENTRY = {
    "imageId": "n12",
    "question": "Is it red?",
    "answer": "yes",
    "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    picture(tmp_path / "n12.jpg")
    return json_file(tmp_path / "gqa.json", {"201": ENTRY, "202": {**ENTRY, "answer": "no"}})


def test_gqa(file: Path) -> None:
    task = read("gqa", file)
    assert [(item.id, item.kind) for item in task.items] == [("201", "verify"), ("202", "verify")]
    assert len(task.question(task.items[0]).images) == 1
    # One of two right; "yes it is" would be wrong.
    assert total(task, {"201": " Yes.", "202": "yes"}) == {"accuracy": 0.5}
    assert total(task, {"201": "yes it is", "202": "no"}) == {"accuracy": 0.5}


@pytest.mark.parametrize(("kind", "expected"), [("semantic", "attr"), ("detailed", "verifyAttr")])
def test_other_kinds(file: Path, kind: str, expected: str) -> None:
    assert read("gqa", file, kind=kind).items[0].kind == expected


def test_gqa_errors(file: Path, tmp_path: Path) -> None:
    refused("gqa", file, "unknown value 'length'", kind="length")
    refused("gqa", json_file(tmp_path / "list.json", [ENTRY]), "must be a JSON object, got list")
    for key, message in (
        ("answer", "question 7: has no answer"),
        ("question", "`question` is missing"),
        ("imageId", "`imageId` is missing"),
    ):
        entry: dict[str, Any] = {name: value for name, value in ENTRY.items() if name != key}
        refused("gqa", json_file(tmp_path / "less.json", {"7": entry}), message)
    refused("gqa", [file, file], "the id '201' occurs twice")
    (tmp_path / "n12.jpg").unlink()
    refused("gqa", file, "1 of 1 images are missing")
