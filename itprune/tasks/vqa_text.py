"""How VQA compares answers: the rules of its evaluation code, in our words.

The rules are facts of GT-Vision-Lab/VQA (`vqaEval.py`, the version for VQA 2.0), those of its
spelling faults included that change what an answer becomes:

- A mark of punctuation is removed where it stands beside a space in the text, or where the text has
  a comma between two digits; elsewhere it becomes a space. A period goes unless a digit follows.
- Words are lower case; none to ten are digits; a, an, the are left out.
- Contractions without their apostrophe get it back.

An answer's value is the mean, over leaving out each human in turn, of
min(other humans who said it / 3, 1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
ARTICLES = frozenset(("a", "an", "the"))
ENOUGH = 3
"""So many humans who said the same make it right."""

# Spelt rightly; the table below takes their apostrophes away. Not all there are in English but
# those of the rules: words as `its` or `well` are words of their own.
_SPELT = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't
could've might've must've not've should've they've we've what've where've who've would've you've
he'd he's how'd how'll how's it'd it'll ma'am o'clock somebody'll somebody's someone'd someone'll
someone's something'd something'll that's there'd there're there's they'd they'll they're 'twas
what'll what're what's when's where'd where's who'd who'll who's why'll why're why's y'all you'd
you'll you're
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've
you'd've
"""


def _misspelt(word: str) -> list[str]:
    """The word without one of its apostrophes, each in turn."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


CONTRACTIONS = {wrong: word for word in _SPELT.split() for wrong in _misspelt(word)} | {
    "somebody'd": "somebodyd"  # the rules have this one the wrong way round
}


def normalise(text: str) -> str:
    """An answer as VQA compares it."""
    words = _without_marks(" ".join(text.split())).lower().split()
    numbered = (NUMBERS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def normalise_read(text: str) -> str:
    """An answer as TextVQA compares it: the same, but commas and question marks are removed first
    and a possessive is a word of its own (the answer processor of facebookresearch/mmf)."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(plain)


def left_as_published(humans: Sequence[str]) -> list[str]:
    """Humans' answers as VQA's script compares them: only their marks are changed, and where all of
    them are equal nothing is. Number words, articles, and a mark on which all agree then stand
    where a normalised answer has none, so that it cannot be right."""
    return [_without_marks(text) for text in humans] if len(set(humans)) > 1 else list(humans)


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """The share of humans who agree, in [0, 1]; both sides normalised.

    Args:
        answer: the model's.
        humans: what each human said; at least one.
    """
    same = sum(human == answer for human in humans)
    others = len(humans) - same
    among_same = min((same - 1) / ENOUGH, 1) if same else 0.0
    return (same * among_same + others * min(same / ENOUGH, 1)) / len(humans)


def _without_marks(text: str) -> str:
    joined = COMMA_IN_NUMBER.search(text) is not None
    changed = text
    for mark in MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if joined or beside else " ")
    return PERIOD.sub("", changed)
