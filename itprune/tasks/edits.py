"""ANLS: how near a read answer is to the right one, by letters.

The similarity is 1 - edits / length of the longer text; the best of the right answers counts, and
below 0.5 it is 0, so that a wrong answer earns nothing for common letters (Biten et al., "Scene
Text Visual Question Answering", 2019; at 0.5 exactly we count it, as the challenge's script does).
"""

from __future__ import annotations

from collections.abc import Iterable

THRESHOLD = 0.5


def anls(answer: str, references: Iterable[str]) -> float:
    """The similarity of an answer to the nearest reference, in {0} and [0.5, 1].

    Case and repeated spaces do not count.
    """
    found = _plain(answer)
    best = max((_similarity(found, _plain(text)) for text in references), default=0.0)
    return best if best >= THRESHOLD else 0.0


def edits(one: str, other: str) -> int:
    """How many letters must be added, removed or replaced (Levenshtein)."""
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        here = [row]
        for column, opposite in enumerate(other, 1):
            replaced = above[column - 1] + (letter != opposite)
            here.append(min(replaced, above[column] + 1, here[-1] + 1))
        above = here
    return above[-1]


def _similarity(one: str, other: str) -> float:
    longer = max(len(one), len(other))
    return 1 - edits(one, other) / longer if longer else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
