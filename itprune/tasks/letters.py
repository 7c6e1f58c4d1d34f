"""Which option an answer chooses.

In this order, as the evaluation code of ScienceQA in LLaVA and of MMBench in VLMEvalKit look for
it: the answer is a letter; it starts with one ("B. …", "(B) …"); it says "answer is B" or
"answer: B"; one letter alone stands in it; it holds one option's text. Anything else chooses
nothing, and is wrong: no other model is asked, and nothing is drawn at random.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

AROUND = " \t\n.,:;()[]{}*\"'`!"
STARTS = re.compile(r"^\(?([A-Z])[.:)](?:\s|$)")
SAYS = re.compile(r"[Aa]nswer(?: is:?|:)\s*\(?([A-Z])(?![A-Za-z])")
SHORT = 3
"""In an answer of more words an A is taken for the article."""


def stated_letter(answer: str, letters: Collection[str]) -> str:
    """The letter an answer states by itself, at its start or as "the answer is"; "" if none.

    Args:
        answer: the model's.
        letters: those that can be chosen, upper case.
    """
    alone = answer.strip(AROUND)
    if len(alone) == 1 and alone.upper() in letters:
        return alone.upper()
    for pattern in (STARTS, SAYS):
        match = pattern.search(answer.strip())
        if match and match[1] in letters:
            return match[1]
    return ""


def chosen_letter(answer: str, options: Mapping[str, str]) -> str:
    """The option an answer chooses, by its letter or its text; "" if none or several.

    Args:
        answer: the model's.
        options: letter, upper case -> text.
    """
    return stated_letter(answer, options) or _only_letter(answer, options) or _text(answer, options)


def _only_letter(answer: str, letters: Collection[str]) -> str:
    words = [word.strip(AROUND) for word in answer.split()]
    found = {word for word in words if word in letters}
    if len(found) != 1 or (found == {"A"} and len(words) > SHORT):
        return ""
    return found.pop()


def _text(answer: str, options: Mapping[str, str]) -> str:
    """By the option's text; an answer that is much longer than all options says too much."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    spoken = answer.lower()
    found = [letter for letter, text in options.items() if text and text.lower() in spoken]
    return found[0] if len(found) == 1 else ""
