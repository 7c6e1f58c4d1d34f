"""Settings of lmms-eval's tasks become our decoding, or one sentence."""

from __future__ import annotations

import pytest

from itprune.decoding import Decoding
from itprune.lmms.settings import LONGEST, cut, decoding, stop_strings, unused


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Decoding(LONGEST)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1}, Decoding(16)),
        ({"temperature": 0, "top_p": 0}, Decoding(LONGEST)),
        ({"temperature": 0.2, "top_p": 0.9}, Decoding(LONGEST, 0.2, 0.9)),
        ({"temperature": 0.7, "do_sample": False}, Decoding(LONGEST)),
        ({"do_sample": True}, Decoding(LONGEST, 1.0)),
        ({"do_sample": True, "temperature": 0.0}, Decoding(LONGEST)),
    ],
)
def test_a_tasks_settings(settings: dict[str, object], expected: Decoding) -> None:
    assert decoding(settings, seed=0) == expected


def test_the_seed_and_the_longest_answer_are_the_callers() -> None:
    assert decoding({}, seed=3, longest=8) == Decoding(8, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 5}, "num_beams=5: .*--gen_kwargs num_beams=1"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"temperature": 1.0, "top_p": 0}, "top_p: must be in"),
    ],
)
def test_what_is_not_possible_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoding(settings, seed=0)


def test_only_what_would_change_answers_is_told() -> None:
    given = {"until": ["x"], "top_k": 5, "image_aspect_ratio": "pad", "repetition_penalty": 1.1}
    assert unused(given) == ("repetition_penalty", "top_k")


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (None, ()),
        ("ASSISTANT:", ("ASSISTANT:",)),
        (["\n\n", "", "Q:", "</s>"], ("Q:", "</s>")),
    ],
)
def test_texts_that_end_an_answer(until: object, expected: tuple[str, ...]) -> None:
    assert stop_strings({"until": until}) == expected


def test_until_must_be_text() -> None:
    with pytest.raises(ValueError, match="must be a text or a list of texts"):
        stop_strings({"until": [3]})


def test_an_answer_ends_at_the_first_of_them() -> None:
    assert cut("two dogs Q: and ASSISTANT: x", ("ASSISTANT:", "Q:")) == "two dogs"
    assert cut("two dogs\n\nand a cat", ("Q:",)) == "two dogs\n\nand a cat"
    assert cut("Q: nothing before", ("Q:",)) == ""
