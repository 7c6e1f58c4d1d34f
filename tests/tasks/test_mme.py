"""MME: the release's folder, JSON lines, Parquet, and scores of categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from itprune.tasks.mme import COGNITION, PERCEPTION, said

from .made import lines_file, picture, png, read, refused, total

ASK = " Please answer yes or no."


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, it is", "yes"),
        (" No, it is not", "no"),
        # The first four letters, wherever the word stands in them, as MME's tool has it.
        ("Not yes", "no"),
        ("It is no dog", ""),
        ("", ""),
    ],
)
def test_reading_an_answer(answer: str, found: str) -> None:
    assert said(answer) == found


def test_fourteen_categories() -> None:
    assert (len(PERCEPTION), len(COGNITION)) == (10, 4)


def release(root: Path) -> Path:
    """Two pictures of counts side by side with their texts, one of OCR in folders of its own."""
    for number in (1, 2):
        picture(root / "count" / f"{number}.jpg")
        text = f"One?{ASK}\tYes\nTwo?{ASK}\tNo\n"
        (root / "count" / f"{number}.txt").write_text(text)
    picture(root / "OCR" / "images" / "1.PNG")
    (root / "OCR" / "questions_answers_YN").mkdir()
    (root / "OCR" / "questions_answers_YN" / "1.txt").write_text(f"A?{ASK}\tYes\n\nB?{ASK}\tNo")
    (root / "eval_tool").mkdir()
    return root


def test_the_releases_folder(tmp_path: Path) -> None:
    task = read("mme", release(tmp_path))
    assert [item.id for item in task.items] == [
        "count/1.jpg#1",
        "count/1.jpg#2",
        "count/2.jpg#1",
        "count/2.jpg#2",
        "OCR/1.PNG#1",
        "OCR/1.PNG#2",
    ]
    assert task.group(task.items[0]) == task.group(task.items[1]) == "count/1.jpg"
    assert task.items[4].record["image"] == "OCR/images/1.PNG"
    text = task.question(task.items[0]).messages[0]["content"][1]["text"]
    assert text == "One?\nAnswer the question using a single word or phrase."
    plain = read("mme", tmp_path, instruction="")
    assert plain.items[0].record["prompt"] == f"One?{ASK}"


def test_scores_by_hand(tmp_path: Path) -> None:
    task = read("mme", release(tmp_path))
    right = {item.id: item.references[0] for item in task.items}
    # 100 + 100 for each of two categories, all of them perception.
    assert total(task, right)["mme_score"] == 400
    answers = right | {"count/1.jpg#2": "Yes"}
    # Count: three of four right, one of two pictures: 75 + 50. OCR: 200.
    assert total(task, answers) == {
        "mme_score": pytest.approx(325),
        "perception": pytest.approx(325),
        "cognition": 0.0,
        "count": pytest.approx(125),
        "OCR": pytest.approx(200),
    }
    # Always yes: 50 + 0 each. An answer that is neither is wrong for both questions.
    assert total(task, dict.fromkeys(right, "Yes"))["mme_score"] == pytest.approx(100)
    assert total(task, dict.fromkeys(right, "Maybe"))["mme_score"] == 0


def row(question: str = "One?", **more: Any) -> dict[str, Any]:
    name = "code_reasoning/1.png"
    ends = {"question": f"{question}{ASK}", "answer": "Yes", "category": "code_reasoning"}
    return {"question_id": name, "image": name, **ends, **more}


def test_json_lines(tmp_path: Path) -> None:
    picture(tmp_path / "code_reasoning" / "1.png")
    rows = [row(), row("Two?", answer="no")]
    task = read("mme", lines_file(tmp_path / "mme.jsonl", rows))
    assert [item.id for item in task.items] == ["code_reasoning/1.png#1", "code_reasoning/1.png#2"]
    found = total(task, {item.id: "yes" for item in task.items})
    assert (found["cognition"], found["perception"]) == (50.0, 0.0)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    image = {"bytes": png(5), "path": None}
    rows = [row(image=image), row("Two?", image=image, answer="No")]
    path = tmp_path / "mme.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    task = read("mme", path)
    assert [item.record["image"] for item in task.items] == ["code_reasoning/1.png"] * 2
    assert task.question(task.items[1]).images[0].getpixel((0, 0)) == (5, 0, 0)
    path.write_bytes(b"no parquet")
    refused("mme", path, "not a readable Parquet file")


def test_mme_errors(tmp_path: Path) -> None:
    picture(tmp_path / "code_reasoning" / "1.png")
    for changed, message in (
        ({"answer": None}, "row 1: has no answer to score with"),
        ({"answer": "perhaps"}, "`answer` must be yes or no, got 'perhaps'"),
        ({"category": "colour"}, "unknown category 'colour'; did you mean 'color'"),
        ({"question": None}, "`text` is missing"),
        ({"image": "gone.png"}, "the first is 'gone.png'"),
        ({"image": {"path": "x"}}, "`image` holds no bytes"),
    ):
        rows = [row() | changed, row("Two?") | changed]
        refused("mme", lines_file(tmp_path / "mme.jsonl", rows), message)


def test_a_picture_with_another_number_of_questions_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "code_reasoning" / "1.png")
    for rows in ([row()], [row(), row("Two?"), row("Three?")], [row(), row(question_id="2")]):
        path = lines_file(tmp_path / "mme.jsonl", rows)
        refused("mme", path, "about a picture, but 'code_reasoning/1.png' has ")


def test_errors_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    refused("mme", tmp_path, "not MME's folder, it has none of its categories")
    root = release(tmp_path)
    (root / "count" / "1.txt").write_text("One? Yes\n")
    refused("mme", root, "1.txt:1: must be a question, a tab and an answer")
    (root / "count" / "1.txt").write_bytes(b"\xff\tYes\n")
    refused("mme", root, "not UTF-8 text")
    (root / "count" / "1.txt").write_text("One?\tYes\n")
    (root / "count" / "1.jpg").unlink()
    refused("mme", root, "has no picture 1.jpg or .png")
