"""ScienceQA: both forms, splits, the image subset, and the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .made import json_file, picture, read, refused, total


def problem(**more: Any) -> dict[str, Any]:
    return {
        "question": "Which is a solid?",
        "choices": ["water", "stone", "air"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "subject": "natural science",
        "topic": "physics",
        "split": "test",
        **more,
    }


PROBLEMS = {
    "1": problem(hint="Look."),
    "2": problem(image=None, subject="language science"),
    "3": problem(split="train"),
    "4": problem(answer=0),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name in ("1", "4"):
        picture(tmp_path / "test" / name / "image.png")
    splits = {"test": ["1", "2", "4"], "train": ["3"]}
    return [
        json_file(tmp_path / "problems.json", PROBLEMS),
        json_file(tmp_path / "pid_splits.json", splits),
    ]


def test_questions_with_an_image(files: list[Path]) -> None:
    for given in (files, files[::-1], files[:1]):
        task = read("scienceqa", given)
        assert [item.id for item in task.items] == ["1", "4"]
    first = task.items[0]
    assert (first.kind, first.references) == ("natural science", ("B",))
    assert task.question(first).messages[0]["content"][1]["text"] == (
        "Context: Look.\nWhich is a solid?\nA. water\nB. stone\nC. air\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert total(task, {"1": "B. stone", "4": "B"}) == {"accuracy": 0.5}
    # D is none of the three choices, a text states no letter.
    assert total(task, {"1": "D", "4": "water"}) == {"accuracy": 0.0}


def test_all_questions(files: list[Path]) -> None:
    task = read("scienceqa", files, subset="all")
    assert [item.id for item in task.items] == ["1", "2", "4"]
    assert not task.question(task.items[1]).images


def test_images_without_the_split_in_their_path(files: list[Path], tmp_path: Path) -> None:
    task = read("scienceqa", files, tmp_path / "test")
    assert task.items[0].record["image"] == "1/image.png"


def test_another_split(files: list[Path], tmp_path: Path) -> None:
    picture(tmp_path / "train" / "3" / "image.png")
    assert [item.id for item in read("scienceqa", files, split="train").items] == ["3"]


def conversation(name: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. this\nB. that"}]
    return {"id": name, "conversations": [*turns, {"from": "gpt", "value": answer}], **more}


def test_llavas_form(tmp_path: Path) -> None:
    picture(tmp_path / "1" / "image.png")
    records = [
        conversation("1", "Answer: The answer is B.", image="1/image.png"),
        conversation("2", "A"),
    ]
    path = json_file(tmp_path / "llava_test.json", records)
    task = read("scienceqa", path)
    assert [(item.id, item.references) for item in task.items] == [("1", ("B",))]
    text = task.question(task.items[0]).messages[-1]["content"][-1]["text"]
    assert text.endswith(
        "B. that\nAnswer with the option's letter from the given choices directly."
    )
    assert total(task, {"1": "b"}) == {"accuracy": 1.0}
    refused("scienceqa", path, "leave out `split`", split="test")


def test_scienceqa_errors(files: list[Path], tmp_path: Path) -> None:
    refused("scienceqa", files, "no split 'tset'; did you mean 'test'", split="tset")
    refused("scienceqa", files, "unknown value 'text'", subset="text")
    for changed, message in (
        ({"answer": None}, "problem 1: has no answer"),
        ({"answer": 3}, "`answer` must be the number of a choice, got 3"),
        ({"choices": "ab"}, "`choices`: must be a JSON list"),
        ({"choices": list("abcdef")}, "has 6 choices, 5 at most"),
        ({"question": None}, "`question` is missing"),
        ({"image": "gone.png"}, "the first is 'test/1/gone.png'"),
    ):
        path = json_file(tmp_path / "problems.json", {"1": problem(**changed)})
        refused("scienceqa", path, message)
    one = json_file(tmp_path / "problems.json", {"1": problem()})
    refused("scienceqa", [one, files[1]], "2 of test's problems are missing, the first is '2'")
    refused("scienceqa", [files[0], one, files[1]], "problem '1' stands in ")
    refused("scienceqa", files[1], "3 of test's problems are missing")
    other = json_file(tmp_path / "list.json", [{"id": "1"}])
    refused("scienceqa", other, "not LLaVA's ScienceQA, it has no `conversations`")
    unsaid = json_file(tmp_path / "list.json", [conversation("1", "that", image="a.png")])
    refused("scienceqa", unsaid, "record 1: has no answer")
    refused("scienceqa", json_file(tmp_path / "text.json", "x"), "must be a JSON object, got str")
