"""The text of an answer as it grows, and what ends it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itprune.serving.saying import Decoded, Said
from tests.tiny_llava import build_tokenizer

TOKENIZER = build_tokenizer()
TEXTS = st.text(st.sampled_from("The square is red. 0 1é漢😀 \n"), max_size=400)
TOKENS = st.lists(st.integers(0, 479), max_size=300)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ids=st.one_of(TEXTS.map(ids_of), TOKENS))
def test_what_is_settled_changes_no_text(ids: list[int]) -> None:
    decoded = Decoded(TOKENIZER)
    for end in range(len(ids) + 1):
        assert decoded(ids[:end]) == TOKENIZER.decode(ids[:end], skip_special_tokens=True)


def test_long_answers_are_not_decoded_anew_with_every_token() -> None:
    class Counting:
        tokens = 0

        def decode(self, ids: list[int], **options: bool) -> str:
            self.tokens += len(ids)
            return TOKENIZER.decode(ids, **options)

    counting, ids = Counting(), ids_of("The square is red. " * 400)
    decoded = Decoded(counting)
    for end in range(len(ids)):
        decoded(ids[:end])
    assert len(ids) > 1500
    assert counting.tokens < 0.15 * len(ids) ** 2 / 2


def test_a_tokenizer_that_looks_far_back_is_decoded_whole() -> None:
    class Counted:
        def decode(self, ids: list[int], **options: bool) -> str:
            return f"{len(ids)} tokens"

    decoded = Decoded(Counted())
    for end in range(200):
        assert decoded([1] * end) == f"{end} tokens"


@pytest.mark.parametrize(
    ("text", "stop", "heard"),
    [
        ("The square is red.", ["is"], "The square"),
        ("The square is red.", ["red!", "area"], "The square is red."),
        ("The square is red.", ["circle", "square is", "The squirrel"], "The"),
        ("The square is red.", [], "The square is red."),
        ("The square", [""], "The square"),
        ("green blue", ["green"], ""),
        ("0 1 2 3", ["2 4", "3"], "0 1 2"),
        ("green\nblue", ["\n"], "green"),
        ("0 1 2 3 4 5 6 7 8 9 " * 20 + "red" + " 0 1", ["red"], ("0 1 2 3 4 5 6 7 8 9 " * 20)[:-1]),
    ],
)
def test_pieces_never_hold_what_a_stop_string_takes(text: str, stop: list[str], heard: str) -> None:
    own, pieces = Said(TOKENIZER, stop), ""
    for token in ids_of(text):
        pieces += own.add(token)
        assert heard.startswith(pieces)
        if own.ended:
            break
    assert pieces + own.rest() == heard
    assert own.ended == (heard != text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS, stop=st.lists(st.sampled_from(("is", "re", "\n", " 0", "é漢")), max_size=2))
def test_pieces_together_are_the_text_up_to_the_first_stop(text: str, stop: list[str]) -> None:
    own, pieces = Said(TOKENIZER, stop), ""
    for token in ids_of(text):
        pieces += own.add(token)
        if own.ended:
            break
    pieces += own.rest()
    whole = text.lstrip()
    ends = [at for at in map(whole.find, stop) if at >= 0]
    assert pieces == (whole[: min(ends)] if ends else whole).strip()
