"""Every value of every format replaced by a wrong one: a task reads the file, or says in one
sentence what is wrong with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itprune.tasks import find_task
from itprune.tasks.base import Item, Task

from .made import picture

WRONG = (None, True, -1, 1.5, "", "x\ny", "x\0", "<image>", [], {}, [None], [[]], {"a": None}, [{}])
TURNS = [
    {"from": "human", "value": "<image>\nWhich?\nA. this"},
    {"from": "gpt", "value": "The answer is A."},
]
PARTS = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Which?"}]
FORMATS: dict[str, list[tuple[str, Any]]] = {
    "vqav2": [
        (
            "vqav2",
            {
                "data_subtype": "val2014",
                "questions": [{"question_id": 1, "image_id": 2, "question": "Which?"}],
                "annotations": [
                    {"question_id": 1, "question_type": "which", "answer_type": "other",
                     "answers": [{"answer": "this", "answer_id": 1}]}
                ],
            },
        )
    ],
    "textvqa": [
        (
            "textvqa",
            {"data": [{"question_id": 1, "image_id": "a", "question": "?", "answers": ["x"]}]},
        )
    ],
    "gqa": [
        (
            "gqa",
            {"1": {"imageId": "a", "question": "?", "answer": "x", "types": {"structural": "y"}}},
        )
    ],
    "scienceqa": [
        (
            "problems",
            {
                "1": {"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "h",
                      "image": "image.png", "subject": "s", "topic": "t", "split": "test"}
            },
        ),
        ("llava", [{"id": "1", "image": "a.png", "conversations": TURNS}]),
    ],
    "pope": [
        (
            "pope",
            [{"question_id": 1, "image": "a.png", "text": "?", "label": "yes", "category": "c"}],
        )
    ],
    "mme": [
        (
            "mme",
            [{"question_id": "1", "image": "a.png", "question": "?", "answer": answer,
              "category": "OCR"} for answer in ("Yes", "No")],
        )
    ],
    "records": [
        ("llava", [{"id": "1", "image": "a.png", "kind": "k", "conversations": TURNS}]),
        ("prompt", [{"id": "1", "images": ["a.png"], "prompt": "Which?", "answers": ["x"]}]),
        (
            "messages",
            [
                {"question_id": 1, "answer": "x",
                 "messages": [{"role": "user", "content": PARTS},
                              {"role": "assistant", "content": "x"}]}
            ],
        ),
    ],
}  # fmt: skip
CASES = [(name, form, content) for name, forms in FORMATS.items() for form, content in forms]


def changed(content: Any) -> Iterator[Any]:
    """The content with each of its values replaced by each wrong one."""
    yield from copy.deepcopy(WRONG)
    keys: list[Any] = []
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = list(range(len(content)))
    for key in keys:
        for value in changed(content[key]):
            whole = copy.copy(content)
            whole[key] = value
            yield whole


def files_of(folder: Path, name: str, content: Any) -> list[Path]:
    """VQAv2's content is two files."""
    parts = [content]
    if name == "vqav2" and isinstance(content, dict):
        one = {key: value for key, value in content.items() if key != "annotations"}
        two = {key: value for key, value in content.items() if key == "annotations"}
        parts = [part for part in (one, two) if part]
    paths = [folder / f"{number}.json" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    return paths


def ask(task: Task, item: Item) -> None:
    """What an evaluation does with an item; what is wrong with one is one sentence too."""
    assert 0 <= task.score(item, "yes")["score"] <= 1
    assert isinstance(item.kind, str)
    assert isinstance(task.group(item), str)
    try:
        task.question(item)
    except ValueError as error:
        message = str(error)
    else:
        message = "asked"
    assert message


@pytest.mark.parametrize(("name", "form", "content"), CASES, ids=[f"{n}-{f}" for n, f, _ in CASES])
def test_wrong_values(tmp_path: Path, name: str, form: str, content: Any) -> None:
    for image in ("a.png", "a.jpg", "COCO_val2014_000000000002.jpg", "1/image.png"):
        picture(tmp_path / image)
    assert find_task(name).read(files_of(tmp_path, name, content), None, {}).items
    for wrong in changed(content):
        for options in ({}, {"instruction": "Be short."}):
            try:
                task = find_task(name).read(files_of(tmp_path, name, wrong), None, options)
            except ValueError as error:
                lines = str(error).splitlines()
            else:
                lines = ["read"]
                for item in task.items:
                    ask(task, item)
                scores = [task.score(item, "A") for item in task.items]
                lines += [] if task.metric in task.total(task.items, scores) else ["no headline"]
            assert len(lines) == 1, f"{wrong}: {lines}"
