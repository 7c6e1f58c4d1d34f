"""Which option an answer chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itprune.tasks.letters import chosen_letter, stated_letter

OPTIONS = {"A": "a red car", "B": "dog", "C": "two cats", "D": "none of them"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b.\n", "B"),
        ("(C)", "C"),
        ("B. dog", "B"),
        ("(B) dog", "B"),
        ("C: two cats", "C"),
        ("The answer is D.", "D"),
        ("the answer is (A)", "A"),
        ("Answer: C", "C"),
        ("The answer is a dog", ""),
        ("The answer is Dogs", ""),
        ("E", ""),
        ("E. dog", ""),
        ("dog", ""),
        ("", ""),
    ],
)
def test_letters_that_are_stated(answer: str, letter: str) -> None:
    assert stated_letter(answer, "ABCD") == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("Option B", "B"),
        ("I think it is B because of its ears", "B"),
        ("B or C", ""),
        ("A or B", ""),
        ("It could be A or C here", ""),
        # In a longer answer an A is an article.
        ("A man and his dog", "B"),
        ("A man walks home", ""),
        ("It must be A", ""),
        ("Surely A", "A"),
        ("The dog.", "B"),
        ("a dog and two cats", ""),
        ("nothing of this", ""),
        # Far longer than all options together.
        ("dog " * 30, ""),
        ("", ""),
    ],
)
def test_letters_and_texts(answer: str, letter: str) -> None:
    assert chosen_letter(answer, OPTIONS) == letter


@given(st.text(max_size=30))
def test_the_choice_is_an_option_or_nothing(answer: str) -> None:
    assert chosen_letter(answer, OPTIONS) in {*OPTIONS, ""}


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "{}.", "({})", "{}. text", "Answer: {}"]))
def test_every_letter_can_be_chosen(letter: str, form: str) -> None:
    assert chosen_letter(form.format(letter), OPTIONS) == letter
