"""Our own formats as a benchmark: exact match, VQA's rules, ANLS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itprune.tasks import find_task
from itprune.tasks.base import Task
from itprune.tasks.edits import anls, edits

from .made import json_file, lines_file, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png")
    return tmp_path


def read(folder: Path, *records: dict[str, Any], **options: str) -> Task:
    path = lines_file(folder / "data.jsonl", records)
    return find_task("records").read([path], None, options)


def llava(answer: str = "8", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
    return {"image": "a.png", "conversations": turns, **more}


def test_llava_json_with_kinds(folder: Path) -> None:
    path = json_file(folder / "data.json", [llava(id="x", kind="digit"), llava(id=7, type="other")])
    task = find_task("records").read([path], None, {})
    assert [(i.id, i.kind, i.references) for i in task.items] == [
        ("x", "digit", ("8",)),
        ("7", "other", ("8",)),
    ]
    assert len(task.question(task.items[0]).images) == 1


def test_prompts_with_answers(folder: Path) -> None:
    task = read(folder, {"prompt": "Which?", "image": "a.png", "answers": ["one", "two"]})
    assert task.items[0].references == ("one", "two")
    assert task.score(task.items[0], " Two. ") == {"score": 1.0}
    assert task.score(task.items[0], "three") == {"score": 0.0}


def test_records_without_an_id_are_numbered_by_file(folder: Path) -> None:
    assert [item.id for item in read(folder, llava(), llava()).items] == ["1", "2"]
    one, two = (lines_file(folder / f"{n}.jsonl", [llava()]) for n in "xy")
    task = find_task("records").read([one, two], None, {})
    assert [item.id for item in task.items] == ["x.jsonl:1", "y.jsonl:1"]


def test_vqa_rules_instead_of_exact_match(folder: Path) -> None:
    plain = read(folder, llava("2 dogs"))
    assert plain.score(plain.items[0], "the two dogs") == {"score": 0.0}
    loose = read(folder, llava("2 dogs"), metric="normalised")
    assert loose.score(loose.items[0], "the two dogs") == {"score": 1.0}
    assert loose.metric == "accuracy"


def test_anls_by_hand(folder: Path) -> None:
    task = read(folder, llava("hello"), metric="anls")
    assert task.metric == "anls"
    # hallo: one letter of five differs, 1 - 1/5.
    assert task.score(task.items[0], "Hallo")["score"] == pytest.approx(0.8)
    # help: two edits (l -> p, o removed) of five letters, 1 - 2/5.
    assert task.score(task.items[0], "help")["score"] == pytest.approx(0.6)
    # he: three of five removed, 0.4 is below the threshold.
    assert task.score(task.items[0], "he")["score"] == 0
    # At the threshold itself: two of four letters.
    assert anls("abxy", ["abcd"]) == 0.5
    # The nearest of several; case and spaces do not count.
    assert anls("New  york", ["boston", "new york"]) == 1
    assert anls("", [""]) == 1
    assert anls("a", []) == 0


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_edits_are_a_distance(one: str, two: str, three: str) -> None:
    assert edits(one, one) == 0
    assert edits(one, two) == edits(two, one)
    assert abs(len(one) - len(two)) <= edits(one, two) <= max(len(one), len(two))
    assert edits(one, three) <= edits(one, two) + edits(two, three)
    assert anls(one, [two]) == 0 or 0.5 <= anls(one, [two]) <= 1


def test_the_instruction_follows_the_last_question(folder: Path) -> None:
    turns = [
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "Second?"}]},
        {"role": "assistant", "content": "no"},
    ]
    task = read(folder, llava(), {"messages": turns}, instruction="Be short.")
    first, second = (task.question(item).messages for item in task.items)
    assert first[-1]["content"][-1]["text"] == "Which?\nBe short."
    assert [part["text"] for part in second[-1]["content"]] == ["Second?", "\nBe short."]
    assert second[0]["content"][0]["text"] == "First?"
    assert turns[2]["content"] == [{"type": "text", "text": "Second?"}]


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"prompt": "Which?"}, {}, "record 1: has no answer to score with"),
        (llava(id="x"), {"metric": "bleu"}, "unknown value 'bleu'"),
        (llava(id="x"), {"metrik": "exact"}, "did you mean 'metric'"),
        (llava(image="gone.png"), {}, "1 of 1 images are missing"),
    ],
)
def test_errors(
    folder: Path, record: dict[str, Any], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(folder, record, **options)
    assert "\n" not in str(caught.value)


def test_a_record_that_is_no_object(folder: Path) -> None:
    path = json_file(folder / "data.json", ["text"])
    with pytest.raises(ValueError, match="record 1: must be a JSON object, got str"):
        find_task("records").read([path], None, {})
