"""POPE: how a yes is read, and precision, recall and F1 from counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itprune.tasks.pope import figures, says_no

from .made import lines_file, picture, read, refused, total


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("No", True),
        ("no, there is none", True),
        ("There is not", True),
        ("No.", True),
        ("Yes", False),
        ("", False),
        ("nothing", False),
        # Only the first sentence counts, and only these three words.
        ("Yes. There is no doubt", False),
        ("NO", False),
    ],
)
def test_reading_an_answer(answer: str, no: bool) -> None:
    assert says_no(answer) is no


def record(number: int, label: str, **more: Any) -> dict[str, Any]:
    text = "Is there a dog in the image?"
    return {"question_id": number, "image": "a.jpg", "text": text, "label": label, **more}


def kind_file(tmp_path: Path, kind: str, labels: str) -> Path:
    picture(tmp_path / "a.jpg")
    return lines_file(
        tmp_path / f"coco_pope_{kind}.json",
        [record(number, label) for number, label in enumerate(labels.split(), 1)],
    )


def test_figures_by_hand(tmp_path: Path) -> None:
    task = read("pope", kind_file(tmp_path, "random", "yes yes yes no no"))
    assert {item.kind for item in task.items} == {"random"}
    said = ["Yes", "Yes", "No", "Yes", "No"]
    answers = {item.id: answer for item, answer in zip(task.items, said, strict=True)}
    # Said yes: 3, rightly 2; right yes: 3. Precision 2/3, recall 2/3; right 3 of 5.
    assert total(task, answers) == {
        "f1": pytest.approx(2 / 3),
        "accuracy": pytest.approx(3 / 5),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "yes_share": pytest.approx(3 / 5),
    }
    assert task.score(task.items[2], "No") == {"score": 0.0, "yes": 0.0}


def test_several_files_are_averaged_over_their_kinds(tmp_path: Path) -> None:
    files = [
        kind_file(tmp_path, "adversarial", "yes no"),
        kind_file(tmp_path, "popular", "yes no no no"),
    ]
    task = read("pope", files)
    assert task.items[0].id == "adversarial/1"
    assert task.items[2].id == "popular/1"
    # Always yes. Adversarial: precision 1/2, recall 1, F1 2/3; popular: 1/4, 1, 2/5.
    found = total(task, {item.id: "Yes" for item in task.items})
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert found["accuracy"] == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_never_yes_is_no_division_by_zero() -> None:
    assert figures([(False, True), (False, False)]) == {
        "f1": 0.0,
        "accuracy": 0.5,
        "precision": 0.0,
        "recall": 0.0,
        "yes_share": 0.0,
    }


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_f1_is_the_harmonic_mean(pairs: list[tuple[bool, bool]]) -> None:
    found = figures(pairs)
    precision, recall = found["precision"], found["recall"]
    both = precision + recall
    assert found["f1"] == pytest.approx(2 * precision * recall / both if both else 0.0)
    assert all(0 <= value <= 1 for value in found.values())


def test_kinds_from_the_lines(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    path = lines_file(tmp_path / "pope.jsonl", [record(1, "yes", category="popular")])
    assert read("pope", path).items[0].kind == "popular"
    path = lines_file(tmp_path / "pope.jsonl", [record(1, "yes")])
    assert (read("pope", path).items[0].kind, read("pope", path).items[0].id) == ("", "1")


def test_pope_errors(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    for changed, message in (
        ({"label": None}, "line 1: has no answer to score with"),
        ({"label": "maybe"}, "`label` must be yes or no, got 'maybe'"),
        ({"text": None}, "`text` is missing"),
        ({"image": "b.jpg"}, "the first is 'b.jpg'"),
    ):
        path = lines_file(tmp_path / "pope.json", [record(1, "yes") | changed])
        refused("pope", path, message)
    refused("pope", lines_file(tmp_path / "x.json", [record(1, "yes")] * 2), "occurs twice")
