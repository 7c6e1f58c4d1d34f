"""Where: the part of a picture that each grid of visual tokens stands on.

Processors crop, squeeze and cut into tiles, each in its own way. What they do is read off a picture
of the same size whose colours are its coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from itprune.answer import Encoded
from itprune.families.base import Family
from itprune.inspecting.places import Place, find_places

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of a picture's width and height."""


@dataclass(frozen=True)
class Spot:
    """One grid of visual tokens on a picture."""

    rows: int
    columns: int
    box: Box
    index: Tensor
    """(rows * columns,) which of the prompt's visual positions each token fills."""


def find_spots(
    family: Family,
    processor: Any,
    size: tuple[int, int],
    encode: Callable[[Image.Image], Encoded],
) -> list[Spot]:
    """The grids of a question with one picture.

    Args:
        family: of the model.
        processor: of the model.
        size: width and height of the picture.
        encode: the question, asked about another picture.
    """
    picture = coordinates(size)
    places = find_places(family, processor, encode(picture).inputs, [picture])
    return [Spot(place.rows, place.columns, _box(place), place.index) for place in places]


def coordinates(size: tuple[int, int]) -> Image.Image:
    """A picture that is redder further to the right, and greener further down."""
    width, height = size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    pixels[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    return Image.fromarray(pixels)


def _box(place: Place) -> Box:
    """What part of `coordinates` a grid's picture shows."""
    if not place.seen:  # the picture as it was given
        return 0.0, 0.0, 1.0, 1.0
    seen = np.asarray(place.picture, dtype=float) / 255
    left, right = _ends(seen[..., 0].mean(0))
    top, bottom = _ends(seen[..., 1].mean(1))
    return left, top, right, bottom


def _ends(line: np.ndarray) -> tuple[float, float]:
    """The outer edges of a line of pixels, from the coordinates of their middles."""
    first, last = float(line[0]), float(line[-1])
    half = (last - first) / max(len(line) - 1, 1) / 2
    return round(min(max(first - half, 0.0), 1.0), 3), round(min(max(last + half, 0.0), 1.0), 3)
