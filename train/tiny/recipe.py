"""What the bundled model is fed, phase by phase; the numbers behind `python -m train.tiny`.

The order matters. Looking up colours and digits comes first and alone: with everything else
beside it, that circuit forms several times later. Places follow, then the questions on pictures
cut down to their digits and a little background, then on whole pictures and on pictures with
background missing, then with more of what is learned slowest, last also on the patches a pruner
would keep.
"""

from __future__ import annotations

from train.tiny.language import Phase

LOOKUPS = {"colour_first": 1.0, "digit_first": 1.0}
PLACES = {"place_last": 0.7, "column_first": 0.7, "row_first": 0.7}
ORDERS = {"left_to_right": 0.4, "right_to_left": 0.4, "top_to_bottom": 0.4}
IN_TEXT = {"larger_in_text": 0.3, "is_larger_in_text": 0.5, "scene_in_text": 0.8}
QUESTIONS = {
    "digit_of_colour": 0.6,
    "colour_of_digit": 0.6,
    "count": 0.6,
    "leftmost": 0.6,
    "two_colours": 0.4,
    "two_digits": 0.4,
    "count_then_digit": 0.4,
    **IN_TEXT,
}


def part(kinds: dict[str, float], share: float) -> dict[str, float]:
    """The kinds with smaller shares."""
    return {name: value * share for name, value in kinds.items()}


ALIGNMENT = [
    Phase(
        "lookups", 200, 1e-3, LOOKUPS, branches=4, patches=(32, 40), digits=(2, 4), align=(0.5, 0.0)
    ),
    Phase(
        "places",
        150,
        1e-3,
        {**LOOKUPS, **PLACES, **IN_TEXT},
        branches=7,
        patches=(32, 40),
        digits=(2, 4),
        align=(0.5, 0.25),
    ),
]
INSTRUCTION = [
    Phase(
        "few",
        450,
        1e-3,
        {**part(LOOKUPS, 0.2), **part(PLACES, 0.4), **ORDERS, **QUESTIONS},
        branches=8,
        patches=(36, 52),
        align=(0.2, 0.1),
    ),
    Phase(
        "all",
        300,
        7e-4,
        {**ORDERS, **QUESTIONS},
        branches=9,
        batch=24,
        patches=(32, 230),
        align=(0.1, 0.1),
    ),
    Phase(
        "polish",
        350,
        8e-4,
        {**ORDERS, **QUESTIONS, "count": 1.0, "scene_in_text": 2.0},
        branches=9,
        batch=24,
        patches=(32, 230),
        align=(0.1, 0.1),
    ),
    Phase(
        "pruned",
        300,
        7e-4,
        {**part(ORDERS, 0.5), **QUESTIONS, "count": 1.0, "scene_in_text": 2.5},
        branches=9,
        batch=24,
        patches=(24, 240),
        by_attention=0.8,
        align=(0.1, 0.1),
    ),
]
