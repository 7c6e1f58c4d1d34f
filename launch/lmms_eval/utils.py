"""What the local tasks of this folder ask about a scene; lmms-eval calls it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from itprune.comparing.scoring import is_right
from itprune.question import ImageFolder

ROOT = Path("data/scenes")
"""Where the task files look for the data, from the working directory."""
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta", "orange", "white")
DIGITS = tuple("0123456789")
TRUTH = ("yes", "no")


def pictures(document: Mapping[str, Any]) -> list[Image.Image]:
    """The scene's picture; none where the scene is told in words."""
    name = document["image"]
    return [] if name is None else [ImageFolder(ROOT)(name)]


def prompt(document: Mapping[str, Any]) -> str:
    """The first question, with `<image>` where the picture stands."""
    return str(document["conversations"][0]["value"])


def right_answer(document: Mapping[str, Any]) -> str:
    """The answer to it."""
    return str(document["conversations"][1]["value"])


def score(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the answer is the right one, written in any case."""
    return {"scenes_exact_match": float(is_right(results[0], [right_answer(document)]))}


def choices(document: Mapping[str, Any]) -> list[str]:
    """All answers of the kind the right one is of."""
    right = right_answer(document)
    return list(next(c for c in (DIGITS, COLOURS, TRUTH, (right,)) if right in c))


def right_choice(document: Mapping[str, Any]) -> int:
    """Place of the right answer among the choices."""
    return choices(document).index(right_answer(document))
