"""Questions about a scene, each with its one right answer.

A kind is a function `(scene, rng) -> Dialogue | None`; None means that the scene leaves the
question open (a colour that occurs twice, two digits equally far left). Base kinds build the
bundled model; quickstart kinds are held out of it and are what the quickstart teaches; the
transfer kinds are held out too, but the model's captions teach it enough to answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from train.scenes.render import COLOUR_NAMES, GRID, Scenes

Rng = np.random.Generator


@dataclass(frozen=True)
class Item:
    """One digit of a scene; rows and columns of the 4 x 4 grid count from the top left."""

    row: int
    column: int
    digit: int
    colour: str


Scene = Sequence[Item]


@dataclass(frozen=True)
class Dialogue:
    """A conversation: `turns` of (question, answer); `image` says whether it needs the picture."""

    kind: str
    turns: tuple[tuple[str, str], ...]
    image: bool = True


def scene_items(scenes: Scenes, index: int) -> list[Item]:
    """The digits of one scene of a batch."""
    items = []
    for slot in np.nonzero(scenes.cell[index] >= 0)[0]:
        row, column = divmod(int(scenes.cell[index, slot]), GRID)
        colour = COLOUR_NAMES[int(scenes.colour[index, slot])]
        items.append(Item(row, column, int(scenes.digit[index, slot]), colour))
    return items


def _one(rng: Rng, choices: Sequence[Item]) -> Item:
    return choices[int(rng.integers(len(choices)))]


def _sole_colours(scene: Scene) -> list[Item]:
    """Digits whose colour occurs once."""
    seen = Counter(item.colour for item in scene)
    return [item for item in scene if seen[item.colour] == 1]


def _sole_digits(scene: Scene) -> list[Item]:
    """Digits whose class occurs once."""
    seen = Counter(item.digit for item in scene)
    return [item for item in scene if seen[item.digit] == 1]


def _outermost(scene: Scene, key: Callable[[Item], int]) -> Item | None:
    """The digit with the smallest key, or None when two share it."""
    best = min(key(item) for item in scene)
    found = [item for item in scene if key(item) == best]
    return found[0] if len(found) == 1 else None


def leftmost_item(scene: Scene) -> Item | None:
    """The only digit of the left-most occupied column."""
    return _outermost(scene, lambda item: item.column)


def rightmost_item(scene: Scene) -> Item | None:
    """The only digit of the right-most occupied column."""
    return _outermost(scene, lambda item: -item.column)


def topmost_item(scene: Scene) -> Item | None:
    """The only digit of the top-most occupied row."""
    return _outermost(scene, lambda item: item.row)


def digit_of_colour(scene: Scene, rng: Rng) -> Dialogue | None:
    """A colour asks for its digit."""
    known = _sole_colours(scene)
    if not known:
        return None
    item = _one(rng, known)
    return Dialogue("digit_of_colour", ((f"What digit is {item.colour}?", str(item.digit)),))


def colour_of_digit(scene: Scene, rng: Rng) -> Dialogue | None:
    """A digit asks for its colour."""
    known = _sole_digits(scene)
    if not known:
        return None
    item = _one(rng, known)
    return Dialogue("colour_of_digit", ((f"What colour is the {item.digit}?", item.colour),))


def count(scene: Scene, rng: Rng) -> Dialogue | None:
    """How many digits."""
    return Dialogue("count", (("How many digits are there?", str(len(scene))),))


def leftmost(scene: Scene, rng: Rng) -> Dialogue | None:
    """The digit furthest left."""
    item = leftmost_item(scene)
    return Dialogue("leftmost", (("Which digit is left-most?", str(item.digit)),)) if item else None


def two_colours(scene: Scene, rng: Rng) -> Dialogue | None:
    """Two turns: a colour's digit, then another's, which only the first turn explains."""
    known = _sole_colours(scene)
    if len(known) < 2:
        return None
    first, second = (known[i] for i in rng.permutation(len(known))[:2])
    opening = (f"What digit is {first.colour}?", str(first.digit))
    return Dialogue("two_colours", (opening, (f"And the {second.colour} one?", str(second.digit))))


def two_digits(scene: Scene, rng: Rng) -> Dialogue | None:
    """Two turns: a digit's colour, then another's."""
    known = _sole_digits(scene)
    if len(known) < 2:
        return None
    first, second = (known[i] for i in rng.permutation(len(known))[:2])
    opening = (f"What colour is the {first.digit}?", first.colour)
    return Dialogue("two_digits", (opening, (f"And the {second.digit}?", second.colour)))


def count_then_digit(scene: Scene, rng: Rng) -> Dialogue | None:
    """Two turns: the count, then a colour's digit."""
    second = digit_of_colour(scene, rng)
    opening = ("How many digits are there?", str(len(scene)))
    return Dialogue("count_then_digit", (opening, *second.turns)) if second else None


def larger_in_text(scene: Scene, rng: Rng) -> Dialogue | None:
    """Text only: the larger of two numbers."""
    first, second = (int(value) for value in rng.permutation(10)[:2])
    question = f"Which is larger, {first} or {second}?"
    return Dialogue("larger_in_text", ((question, str(max(first, second))),), image=False)


def is_larger_in_text(scene: Scene, rng: Rng) -> Dialogue | None:
    """Text only: whether one number exceeds another."""
    first, second = (int(value) for value in rng.permutation(10)[:2])
    answer = "yes" if first > second else "no"
    question = f"Is {first} larger than {second}?"
    return Dialogue("is_larger_in_text", ((question, answer),), image=False)


def scene_in_text(scene: Scene, rng: Rng) -> Dialogue | None:
    """Text only: a scene in words, then a colour asks for its digit."""
    number = int(rng.integers(2, 5))
    colours = [COLOUR_NAMES[i] for i in rng.permutation(len(COLOUR_NAMES))[:number]]
    digits = [int(value) for value in rng.permutation(10)[:number]]
    told = [f"a {colour} {digit}" for colour, digit in zip(colours, digits, strict=True)]
    asked = int(rng.integers(number))
    words = f"I see {', '.join(told[:-1])} and {told[-1]}."
    question = f"{words} What digit is {colours[asked]}?"
    return Dialogue("scene_in_text", ((question, str(digits[asked])),), image=False)


def rightmost(scene: Scene, rng: Rng) -> Dialogue | None:
    """The digit furthest right."""
    item = rightmost_item(scene)
    return (
        Dialogue("rightmost", (("Which digit is right-most?", str(item.digit)),)) if item else None
    )


def topmost(scene: Scene, rng: Rng) -> Dialogue | None:
    """The digit furthest up."""
    item = topmost_item(scene)
    return Dialogue("topmost", (("Which digit is top-most?", str(item.digit)),)) if item else None


def bottommost(scene: Scene, rng: Rng) -> Dialogue | None:
    """The digit furthest down."""
    item = _outermost(scene, lambda item: -item.row)
    question = "Which digit is bottom-most?"
    return Dialogue("bottommost", ((question, str(item.digit)),)) if item else None


def largest(scene: Scene, rng: Rng) -> Dialogue | None:
    """The largest number."""
    value = max(item.digit for item in scene)
    return Dialogue("largest", (("Which is the largest digit?", str(value)),))


def leftmost_colour(scene: Scene, rng: Rng) -> Dialogue | None:
    """The colour of the digit furthest left."""
    item = leftmost_item(scene)
    question = "What colour is the left-most digit?"
    return Dialogue("leftmost_colour", ((question, item.colour),)) if item else None


def is_there(scene: Scene, rng: Rng) -> Dialogue | None:
    """Whether a digit occurs; yes and no are equally frequent."""
    present = {item.digit for item in scene}
    wanted = bool(rng.integers(2))
    choices = sorted(present if wanted else set(range(10)) - present)
    digit = choices[int(rng.integers(len(choices)))]
    return Dialogue("is_there", ((f"Is there a {digit}?", "yes" if wanted else "no"),))


Kind = Callable[[Scene, Rng], Dialogue | None]
BASE: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        digit_of_colour,
        colour_of_digit,
        count,
        leftmost,
        two_colours,
        two_digits,
        count_then_digit,
        larger_in_text,
        is_larger_in_text,
        scene_in_text,
    )
}
QUICKSTART: dict[str, Kind] = {kind.__name__: kind for kind in (leftmost_colour, is_there, largest)}
TRANSFER: dict[str, Kind] = {kind.__name__: kind for kind in (rightmost, topmost, bottommost)}
SETS: dict[str, dict[str, Kind]] = {
    "base": BASE,
    "quickstart": QUICKSTART,
    "transfer": TRANSFER,
    "all": {**BASE, **QUICKSTART, **TRANSFER},
}
