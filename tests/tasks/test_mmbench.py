"""MMBench: the TSV with its images, options, and circular evaluation."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

import pytest

from itprune.tasks import files
from itprune.tasks.base import Task

from .made import png, read, refused, total

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image",
           "l2-category", "split")  # fmt: skip


def row(index: int, answer: str = "A", colour: int = 0, **more: Any) -> dict[str, Any]:
    options = {"A": "red", "B": "green", "C": "blue", "D": ""}
    image = base64.b64encode(png(colour)).decode()
    kinds = {"category": "colour", "l2-category": "perception", "split": "dev", "hint": "nan"}
    return {"index": index, "question": "Which?", "answer": answer, "image": image,
            **options, **kinds, **more}  # fmt: skip


def tsv(path: Path, *rows: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_tsv(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", row(7, hint="Look.\nHere."), row(8, "B", 1, D="None"))
    task = read("mmbench", path)
    first, second = task.items
    assert (first.id, first.kind, first.references) == ("7", "colour", ("A",))
    question = task.question(first)
    assert question.messages[0]["content"][1]["text"] == (
        "Look.\nHere.\nWhich?\nA. red\nB. green\nC. blue\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert question.images[0].getpixel((0, 0)) == (0, 0, 0)
    assert task.question(second).images[0].getpixel((0, 0)) == (1, 0, 0)
    assert second.record["image"] != first.record["image"]
    assert total(task, {"7": "red", "8": "A"}) == {"accuracy": 0.5, "first_turn": 0.5}
    assert read("mmbench", path, kind="l2-category").items[0].kind == "perception"


def test_none_can_be_the_right_answer(tmp_path: Path) -> None:
    task = read("mmbench", tsv(tmp_path / "a.tsv", row(1, "D", D="None")))
    assert task.items[0].facts["options"]["D"] == "None"


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", row(1))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [item.id for item in read("mmbench", path).items] == ["1"]


def circular(tmp_path: Path) -> Task:
    """Question 1 in three turns, question 11 in two."""
    rows = [
        row(1, "A"),
        row(11, "B", 1, C=""),
        row(1_000_001, "C", A="green", B="blue", C="red"),
        row(1_000_011, "A", 1, A="green", B="red", C=""),
        row(2_000_001, "B", A="blue", B="red", C="green"),
    ]
    return read("mmbench", tsv(tmp_path / "a.tsv", *rows))


def test_a_question_is_right_when_all_its_turns_are(tmp_path: Path) -> None:
    task = circular(tmp_path)
    assert [task.group(item) for item in task.items] == ["1", "11", "1", "11", "1"]
    right = {item.id: item.references[0] for item in task.items}
    assert total(task, right) == {"accuracy": 1.0, "first_turn": 1.0}
    # One turn of question 1 is wrong: half of the questions, though first turns are right.
    found = total(task, right | {"2000001": "A"})
    assert found == {"accuracy": pytest.approx(0.5), "first_turn": 1.0}
    # Always A: question 1 fails in turns two and three, question 2 in the first.
    assert total(task, dict.fromkeys(right, "A")) == {"accuracy": 0.0, "first_turn": 0.5}


def test_a_picture_is_kept_once(tmp_path: Path) -> None:
    items = circular(tmp_path).items
    first, third = (next(iter(items[n].pictures.values())) for n in (0, 2))
    assert first is third


def test_an_image_that_is_another_rows(tmp_path: Path) -> None:
    path = tsv(tmp_path / "a.tsv", row(1_000_001, image="1"), row(1, colour=9))
    task = read("mmbench", path)
    assert task.question(task.items[0]).images[0].getpixel((0, 0)) == (9, 0, 0)
    path = tsv(tmp_path / "a.tsv", row(1_000_001, image="5"))
    refused("mmbench", path, "row 1: its image is that of row 5, which has none")


def test_mmbench_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for changed, message in (
        ({"answer": ""}, "row 1: has no answer to score with; test splits hold none"),
        ({"answer": "D"}, "the answer 'D' is none of its options"),
        ({"image": ""}, "row 1: has no image"),
        ({"image": "####"}, "row 1: its image is not base64"),
        ({"image": "abc"}, "row 1: its image is not base64"),
        ({"index": "x"}, "`index` must be a whole number, got 'x'"),
    ):
        refused("mmbench", tsv(path, row(1) | changed), message)
    refused("mmbench", tsv(path, row(1), row(1)), "the id '1' occurs twice")
    refused("mmbench", tsv(path, row(1)), "unknown value 'l3'", kind="l3")
    without = tuple(name for name in COLUMNS if name != "answer")
    refused("mmbench", tsv(path, row(1), columns=without), "row 1: has no answer")
    short = tuple(name for name in COLUMNS if name != "image")
    refused("mmbench", tsv(path, row(1), columns=short), "it has no column 'image'")
    path.write_text("index\tquestion\tA\tB\timage\n1\tWhich?\n", encoding="utf-8")
    refused("mmbench", path, "a.tsv:2: has another number of fields")
    path.write_bytes(b"\xff\xfe\x00")
    refused("mmbench", path, "not UTF-8 text")
    refused("mmbench", tmp_path, "cannot be read")


def test_images_are_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    image = base64.b64encode(png() + bytes(before)).decode()
    task = read("mmbench", tsv(tmp_path / "a.tsv", row(1, image=image)))
    assert len(task.question(task.items[0]).images) == 1
    assert csv.field_size_limit() == before


def test_a_field_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = csv.field_size_limit()
    monkeypatch.setattr(files, "MOST", 100)
    refused("mmbench", tsv(tmp_path / "a.tsv", row(1, question="?" * 200)), "field larger than")
    refused("mmbench", tsv(tmp_path / "a.tsv", row(1, image="####")), "is not base64")
    assert csv.field_size_limit() == before
