"""Captions for the alignment stage: the picture said in words.

Digits are named in random order, so that after a colour word the digit can only come from the
picture (and the other way round, and likewise for the words of rows and columns); the ordered
lists teach which of several digits comes first.
"""

from __future__ import annotations

import numpy as np

from train.scenes.questions import Dialogue, Item, Kind, Scene

Rng = np.random.Generator
COLUMN_WORDS = ("left", "west", "east", "right")
ROW_WORDS = ("top", "upper", "lower", "bottom")


def _shuffled(scene: Scene, rng: Rng) -> list[Item]:
    return [scene[index] for index in rng.permutation(len(scene))]


def colour_first(scene: Scene, rng: Rng) -> Dialogue | None:
    """Colours with their digits, in random order."""
    if len({item.colour for item in scene}) < len(scene):
        return None
    said = ", ".join(f"{item.colour} {item.digit}" for item in _shuffled(scene, rng))
    return Dialogue("colour_first", (("Name the colours.", said),))


def digit_first(scene: Scene, rng: Rng) -> Dialogue | None:
    """Digits with their colours, in random order."""
    if len({item.digit for item in scene}) < len(scene):
        return None
    said = ", ".join(f"{item.digit} {item.colour}" for item in _shuffled(scene, rng))
    return Dialogue("digit_first", (("Name the digits.", said),))


def place_last(scene: Scene, rng: Rng) -> Dialogue | None:
    """Colours with the row and the column of their digits, in random order."""
    if len({item.colour for item in scene}) < len(scene):
        return None
    said = ", ".join(
        f"{item.colour} {ROW_WORDS[item.row]} {COLUMN_WORDS[item.column]}"
        for item in _shuffled(scene, rng)
    )
    return Dialogue("place_last", (("Name the places.", said),))


def column_first(scene: Scene, rng: Rng) -> Dialogue | None:
    """Columns that hold a single digit with that digit, in random order."""
    return _line_first(scene, rng, "columns", [item.column for item in scene], COLUMN_WORDS)


def row_first(scene: Scene, rng: Rng) -> Dialogue | None:
    """Rows that hold a single digit with that digit, in random order."""
    return _line_first(scene, rng, "rows", [item.row for item in scene], ROW_WORDS)


def _line_first(
    scene: Scene, rng: Rng, name: str, lines: list[int], words: tuple[str, ...]
) -> Dialogue | None:
    pairs = [(line, item.digit) for line, item in zip(lines, scene, strict=True)]
    single = [pair for pair in pairs if lines.count(pair[0]) == 1]
    if not single:
        return None
    order = rng.permutation(len(single))
    said = ", ".join(f"{words[single[i][0]]} {single[i][1]}" for i in order)
    return Dialogue(f"{name[:-1]}_first", ((f"Name the {name}.", said),))


def _ordered(scene: Scene, name: str, words: str, sign: int, down: bool) -> Dialogue:
    """Digits sorted along one axis; ties go by the other axis."""

    def place(item: Item) -> tuple[int, int]:
        along, across = (item.row, item.column) if down else (item.column, item.row)
        return sign * along, across

    said = ", ".join(str(item.digit) for item in sorted(scene, key=place))
    return Dialogue(name, ((f"List the digits from {words}.", said),))


def left_to_right(scene: Scene, rng: Rng) -> Dialogue | None:
    """Digits from left to right."""
    return _ordered(scene, "left_to_right", "left to right", 1, down=False)


def right_to_left(scene: Scene, rng: Rng) -> Dialogue | None:
    """Digits from right to left."""
    return _ordered(scene, "right_to_left", "right to left", -1, down=False)


def top_to_bottom(scene: Scene, rng: Rng) -> Dialogue | None:
    """Digits from top to bottom."""
    return _ordered(scene, "top_to_bottom", "top to bottom", 1, down=True)


CAPTIONS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        colour_first,
        digit_first,
        place_last,
        column_first,
        row_first,
        left_to_right,
        right_to_left,
        top_to_bottom,
    )
}
