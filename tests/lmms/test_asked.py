"""Requests of lmms-eval become questions: their pictures, their places, their batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from itprune.lmms.asked import Asked, batches

PICTURE = Image.new("L", (20, 10))
DOCUMENTS = {
    "task": {"test": [{"pictures": [PICTURE]}, {"pictures": None}, {"pictures": ["a.mp4"]}]}
}


def request(prompt: str, document: int = 0, settings: Any = None) -> SimpleNamespace:
    visuals = lambda found: found["pictures"]  # noqa: E731
    return SimpleNamespace(args=(prompt, settings or {}, visuals, document, "task", "test"))


def test_pictures_stand_before_the_prompt_as_rgb() -> None:
    question = Asked.to_answer(0, request("What is it?")).question(DOCUMENTS)
    assert [part["type"] for part in question.messages[0]["content"]] == ["image", "text"]
    assert [image.mode for image in question.images] == ["RGB"]


def test_pictures_stand_where_the_prompt_says() -> None:
    question = Asked.to_answer(0, request("Look: <image>\nWhat is it?")).question(DOCUMENTS)
    assert [p["type"] for p in question.messages[0]["content"]] == ["text", "image", "text"]


def test_a_document_without_pictures_is_text() -> None:
    question = Asked.to_answer(0, request("Which is it?", document=1)).question(DOCUMENTS)
    assert question.images == ()


def test_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="shows a str where only pictures can be shown"):
        Asked.to_answer(0, request("What happens?", document=2)).question(DOCUMENTS)


def test_the_answer_to_be_judged_is_a_text_or_made_of_the_document() -> None:
    given = request("Which?")
    given.args = ("Which?", " B", *given.args[2:])
    assert Asked.to_judge(0, given).answer(DOCUMENTS) == " B"
    given.args = ("Which?", lambda found: len(found["pictures"]), *given.args[2:])
    assert Asked.to_judge(0, given).answer(DOCUMENTS) == "1"


def test_answers_without_a_question_are_refused() -> None:
    with pytest.raises(ValueError, match="acc_mutual_info"):
        Asked.to_judge(0, SimpleNamespace(args=("", "B")))


def test_batches_are_drawn_alike_and_of_like_length() -> None:
    short, long = {"max_new_tokens": 4}, {"max_new_tokens": 9}
    prompts = [("bb", short), ("a", long), ("ccc", short), ("dddd", short)]
    asked = [Asked.to_answer(i, request(p, settings=s)) for i, (p, s) in enumerate(prompts)]
    found = [[one.prompt for one in batch] for batch in batches(asked, 2)]
    assert found == [["dddd", "ccc"], ["bb"], ["a"]]
