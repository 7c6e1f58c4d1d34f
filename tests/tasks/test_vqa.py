"""VQAv2 and TextVQA: normalisation rule by rule, soft accuracy by hand, the two formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itprune.tasks.vqa_text import CONTRACTIONS, normalise, normalise_read, soft_accuracy

from .made import json_file, picture, read, refused, total

WORDS = st.sampled_from(["yes", "no", "2", "a dog"])


@pytest.mark.parametrize(
    ("said", "becomes"),
    [
        ("Yes", "yes"),
        ("  two\n dogs ", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("The man on a horse", "man on horse"),
        ("an", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("its", "its"),
        ("Dont", "don't"),
        # A mark beside a space goes, one between letters becomes a space.
        ("yes, it is", "yes it is"),
        ("t-shirt", "t shirt"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        # The rule looks at the whole text: here a hyphen beside a space is found too.
        ("t-shirt - red", "tshirt red"),
        # The text as it was given: the space that the semicolon leaves is not beside the hyphen.
        ("x;-y p-q", "x y p q"),
        ("yes!", "yes"),
        ("?", ""),
        # A comma between digits takes all marks away, its own too.
        ("1,000", "1000"),
        ("1,000 black/white", "1000 blackwhite"),
        # A period goes unless a digit follows.
        ("st. mary", "st mary"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("a.m.", "am"),
        ("o'clock", "o'clock"),
        ("6:30", "6:30"),
    ],
)
def test_normalisation(said: str, becomes: str) -> None:
    assert normalise(said) == becomes


def test_the_table_of_contractions() -> None:
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["shouldn'tve"] == CONTRACTIONS["shouldnt've"] == "shouldn't've"
    assert CONTRACTIONS["y'alld've"] == "y'all'd've"
    assert CONTRACTIONS["twas"] == "'twas"
    # Words of their own are left alone.
    assert not {"its", "well", "were", "hell", "shell", "ill", "id", "lets"} & CONTRACTIONS.keys()


def test_textvqa_takes_possessives_apart() -> None:
    assert normalise_read("Mary's shop") == "mary 's shop"
    assert normalise("Mary's shop") == "mary's shop"
    # Without its comma the number is no longer one with a comma, so the slash becomes a space.
    assert normalise_read("1,000 x/y") == "1000 x y"
    assert normalise_read("x?y") == "xy"


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        (0, 0.0),
        # One of ten: leaving her out, none is left; nine times one of three.
        (1, 9 * (1 / 3) / 10),
        # Two: leaving one of them out, one is left, 1/3; eight times 2/3.
        (2, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        # Three: leaving one out, 2/3; seven times 1.
        (3, (3 * (2 / 3) + 7 * 1) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_soft_accuracy_of_ten_humans(same: int, expected: float) -> None:
    humans = ["yes"] * same + ["no"] * (10 - same)
    assert soft_accuracy("yes", humans) == pytest.approx(expected)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=12), st.randoms())
def test_soft_accuracy_is_a_share_and_order_does_not_count(
    answer: str, humans: list[str], chance: Any
) -> None:
    shuffled = list(humans)
    chance.shuffle(shuffled)
    found = soft_accuracy(answer, humans)
    assert 0 <= found <= 1
    assert soft_accuracy(answer, shuffled) == found
    # Leaving each human out in turn, as the definition says.
    left = [humans[:n] + humans[n + 1 :] for n in range(len(humans))]
    by_hand = sum(min(others.count(answer) / 3, 1) for others in left) / len(humans)
    assert found == pytest.approx(by_hand)


@given(st.text(max_size=20))
def test_normalised_text_has_single_spaces_and_no_capitals(text: str) -> None:
    found = normalise(text)
    assert found == " ".join(found.split())
    assert found == found.lower()


# ---------------------------------------------------------------------------------------- VQAv2
def asked(**more: Any) -> dict[str, Any]:
    return {"image_id": 42, "question": "How many dogs?", "question_id": 42000, **more}


def noted(answers: list[str], **more: Any) -> dict[str, Any]:
    said = [{"answer": text, "answer_confidence": "yes", "answer_id": n + 1}
            for n, text in enumerate(answers)]  # fmt: skip
    kinds = {"question_type": "how many", "answer_type": "number"}
    return {"question_id": 42000, "image_id": 42, "answers": said, **kinds, **more}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    picture(tmp_path / "COCO_val2014_000000000042.jpg")
    humans = ["2"] * 3 + ["two dogs"] * 2 + ["3"] * 5
    questions = {"data_subtype": "val2014", "questions": [asked()]}
    return [
        json_file(tmp_path / "questions.json", questions),
        json_file(tmp_path / "annotations.json", {"annotations": [noted(humans)]}),
    ]


def test_vqav2(files: list[Path]) -> None:
    for given_files in (files, files[::-1]):
        task = read("vqav2", given_files)
        (item,) = task.items
        assert (item.id, item.kind) == ("42000", "number")
        assert len(task.question(item).images) == 1
        assert item.record["prompt"].startswith("How many dogs?\nAnswer the question using")
    # "Two." becomes 2, which three said: (3 * 2/3 + 7 * 1) / 10.
    assert total(task, {"42000": "Two."}) == {"accuracy": pytest.approx(0.9)}
    # "the 2 dogs" becomes "2 dogs", as does what two said: (2 * 1/3 + 8 * 2/3) / 10.
    assert total(task, {"42000": "the 2 dogs"}) == {"accuracy": pytest.approx(0.6)}


def test_a_hyphen_all_agree_on_can_be_right(tmp_path: Path) -> None:
    picture(tmp_path / "000000000042.jpg")
    questions = json_file(tmp_path / "q.json", {"questions": [asked()]})
    annotations = json_file(tmp_path / "a.json", {"annotations": [noted(["t-shirt"] * 10)]})
    task = read("vqav2", [questions, annotations], images="coco2017")
    assert total(task, {"42000": "T-shirt"}) == {"accuracy": 1.0}


def test_vqav2_by_type_of_question(files: list[Path]) -> None:
    assert [item.kind for item in read("vqav2", files, kind="question_type").items] == ["how many"]


@pytest.mark.parametrize(
    ("humans", "answer", "published"),
    [
        (["t-shirt"] * 10, "t-shirt", 0.0),  # all agree: left as it stands, "t shirt" is not it
        (["t-shirt"] * 9 + ["shirt"], "t-shirt", 1.0),  # else both become "t shirt"
        (["none"] * 9 + ["no"], "none", 0.0),  # the answer becomes 0, what they said does not
        (["the sea"] * 9 + ["sea"], "the sea", 0.3),  # becomes "sea", which one of ten said
        (["yes"] * 10, "Yes.", 1.0),
    ],
)
def test_humans_as_vqas_script_leaves_them(
    tmp_path: Path, humans: list[str], answer: str, published: float
) -> None:
    picture(tmp_path / "COCO_val2014_000000000042.jpg")
    questions = json_file(tmp_path / "q.json", {"questions": [asked()]})
    annotations = json_file(tmp_path / "a.json", {"annotations": [noted(humans)]})
    files = [questions, annotations]
    assert total(read("vqav2", files), {"42000": answer}) == {"accuracy": 1.0}
    task = read("vqav2", files, humans="published")
    assert total(task, {"42000": answer}) == {"accuracy": pytest.approx(published)}


def test_vqav2_errors(files: list[Path], tmp_path: Path) -> None:
    questions, annotations = files
    refused("vqav2", questions, "has no answer to score with; test splits hold none")
    refused("vqav2", annotations, "the file of the questions is missing")
    refused("vqav2", [questions, questions], "a second file of questions")
    refused("vqav2", files, "unknown value '2014'", images="2014")
    refused("vqav2", files, "task vqav2: kind", kind="type")
    refused("vqav2", files, "task vqav2: humans", humans="raw")
    double = json_file(tmp_path / "double.json", {"annotations": [noted(["1"]), noted(["2"])]})
    refused("vqav2", [questions, double], "question '42000' has an annotation already")
    other = json_file(tmp_path / "other.json", {"data": []})
    refused("vqav2", [questions, other], "it has no list `questions` or `annotations`")
    refused("vqav2", json_file(tmp_path / "list.json", []), "must be a JSON object, got list")
    twice = json_file(tmp_path / "twice.json", {"questions": [asked(), asked()]})
    refused("vqav2", [twice, annotations], "the id '42000' occurs twice")
    more = json_file(tmp_path / "more.json", {"questions": [asked(), asked(question_id=43)]})
    refused("vqav2", [more, annotations], "question 2 (id '43'): has no answer")
    bare = json_file(tmp_path / "bare.json", {"questions": [{"question_id": 42000}]})
    refused("vqav2", [bare, annotations], "question 1: `image_id` is missing")
    empty = json_file(tmp_path / "empty.json", {"annotations": [noted([])]})
    refused("vqav2", [questions, empty], "the annotation of question 42000: has no answer")
    (tmp_path / "COCO_val2014_000000000042.jpg").unlink()
    refused("vqav2", files, "the first is 'COCO_val2014_000000000042.jpg'")


# -------------------------------------------------------------------------------------- TextVQA
def read_text(tmp_path: Path, *entries: dict[str, Any]) -> Path:
    picture(tmp_path / "ab12.jpg")
    return json_file(tmp_path / "textvqa.json", {"dataset_type": "val", "data": list(entries)})


ENTRY = {
    "question_id": 34602,
    "image_id": "ab12",
    "question": "what shop is it?",
    "answers": ["mary's"] * 2 + ["Mary 's"] * 2 + ["unknown"] * 6,
}


def test_textvqa(tmp_path: Path) -> None:
    task = read("textvqa", read_text(tmp_path, ENTRY))
    assert [(item.id, item.kind) for item in task.items] == [("34602", "")]
    assert len(task.question(task.items[0]).images) == 1
    # Both spellings become "mary 's", which four said.
    assert total(task, {"34602": "Mary's"}) == {"accuracy": 1.0}
    assert total(task, {"34602": "shop"}) == {"accuracy": 0.0}


def test_textvqa_errors(tmp_path: Path) -> None:
    test_split = {key: value for key, value in ENTRY.items() if key != "answers"}
    refused("textvqa", read_text(tmp_path, test_split), "question 1: has no answer to score with")
    refused("textvqa", read_text(tmp_path, ENTRY, ENTRY), "the id '34602' occurs twice")
    refused("textvqa", read_text(tmp_path, {**ENTRY, "image_id": "x"}), "the first is 'x.jpg'")
    refused("textvqa", read_text(tmp_path, {**ENTRY, "answers": [[]]}), "must be text, got list")
    other = json_file(tmp_path / "other.json", {"questions": []})
    refused("textvqa", other, "not TextVQA's JSON, it has no list `data`")
