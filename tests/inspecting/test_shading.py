"""Kept patches keep their pixels, dropped ones are dim, a line runs between them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from itprune.inspecting.shading import (
    EDGE,
    LONGEST,
    PAPER,
    SHARE,
    SHORTEST,
    faded,
    shaded,
    viewable,
)

BRIGHT = (200, 220, 240)


def plain(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), BRIGHT)


def dim() -> tuple[int, ...]:
    return tuple(int(SHARE * level + (1 - SHARE) * PAPER) for level in BRIGHT)


def test_pixels_of_a_known_grid() -> None:
    kept = np.array([[True, False, True], [False, False, True]])
    pixels = np.asarray(faded(plain(30, 20), kept))
    assert pixels.shape == (20, 30, 3)
    for row in range(2):
        for column in range(3):
            patch = pixels[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
            want = BRIGHT if kept[row, column] else dim()
            assert (patch == want).all(), (row, column)


def test_a_grid_that_does_not_divide_the_picture() -> None:
    kept = np.zeros((3, 3), dtype=bool)
    kept[2, 2] = True
    pixels = np.asarray(faded(plain(10, 10), kept))
    assert tuple(pixels[9, 9]) == BRIGHT
    assert tuple(pixels[0, 0]) == tuple(pixels[9, 0]) == tuple(pixels[0, 9]) == dim()


def test_a_line_runs_between_kept_and_dropped_and_nowhere_else() -> None:
    kept = np.array([[True, False], [True, False]])
    pixels = np.asarray(shaded(plain(SHORTEST, SHORTEST), kept))
    half = SHORTEST // 2
    edge = (pixels == EDGE).all(-1)
    assert edge[:, half - 2 : half].all()
    assert edge.sum() == 2 * SHORTEST
    assert tuple(pixels[half, half // 2]) == BRIGHT
    assert tuple(pixels[half, half + half // 2]) == dim()


@pytest.mark.parametrize("value", [True, False])
def test_all_or_nothing_has_no_line(value: bool) -> None:
    pixels = np.asarray(shaded(plain(SHORTEST, SHORTEST), np.full((4, 4), value)))
    assert (pixels == (BRIGHT if value else dim())).all()


def test_dropped_is_darker_on_bright_pictures() -> None:
    assert max(dim()) < min(BRIGHT)


@pytest.mark.parametrize(
    ("size", "want"),
    [
        ((96, 96), (288, 288)),
        ((300, 100), (300, 100)),
        ((4000, 1000), (LONGEST, LONGEST // 4)),
        ((1, 4000), (1, LONGEST)),
        ((1, 1), (SHORTEST, SHORTEST)),
    ],
)
def test_pictures_have_a_size_to_be_looked_at(size: tuple[int, int], want: tuple[int, int]) -> None:
    assert viewable(plain(*size)).size == want


def test_small_pictures_grow_by_whole_pixels() -> None:
    small = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    grown = np.asarray(viewable(small))
    assert (grown[:: SHORTEST // 2, :: SHORTEST // 2] == np.asarray(small)).all()
