"""Shading: a picture with its kept patches bright and its dropped ones dim.

Dimming alone says nothing on a dark picture, so a line runs around what is kept, too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.bool_]
EDGE = (230, 159, 0)
"""Orange of Okabe and Ito."""
LONGEST, SHORTEST = 448, 240
"""Pixels of a written picture's longer side: large ones shrink, small ones grow."""
PAPER, SHARE = 40, 0.3
"""Dropped patches: the grey level they are mixed with, and how much of their own stays."""


def faded(
    picture: Image.Image, kept: Mask, paper: int = PAPER, share: float = SHARE
) -> Image.Image:
    """The picture with its dropped patches mixed into one grey.

    Args:
        picture: RGB.
        kept: (rows, columns) bool; the grid covers the picture.
        paper: level of that grey, 0 to 255.
        share: how much of a dropped pixel stays.
    """
    pixels = np.asarray(picture, dtype=float)
    dim = share * pixels + (1 - share) * paper
    stays = _stretched(kept, picture.size)
    return Image.fromarray(np.where(stays[..., None], pixels, dim).astype(np.uint8))


def shaded(picture: Image.Image, kept: Mask) -> Image.Image:
    """`faded`, with a line around the kept patches, at a size to be looked at."""
    view = viewable(picture)
    pixels = np.array(faded(view, kept))
    pixels[_edges(_stretched(kept, view.size))] = EDGE
    return Image.fromarray(pixels)


def viewable(picture: Image.Image) -> Image.Image:
    """The picture with its longer side between `SHORTEST` and `LONGEST` pixels."""
    longest = max(picture.size)
    if longest > LONGEST:
        size = [max(1, round(side * LONGEST / longest)) for side in picture.size]
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    times = -(-SHORTEST // longest)
    size = [side * times for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.NEAREST) if times > 1 else picture


def _stretched(kept: Mask, size: tuple[int, int]) -> Mask:
    """(rows, columns) -> (height, width): which pixels lie in kept patches."""
    rows = np.arange(size[1]) * kept.shape[0] // size[1]
    columns = np.arange(size[0]) * kept.shape[1] // size[0]
    return kept[rows[:, None], columns]


def _edges(stays: Mask) -> Mask:
    """Pixels on the kept side of a border between kept and dropped; two pixels wide."""
    padded = np.pad(stays, 2, mode="edge")
    height, width = stays.shape
    beside = np.zeros_like(stays)
    for shift in (1, 2, -1, -2):
        beside |= ~padded[2 + shift : 2 + shift + height, 2 : 2 + width]
        beside |= ~padded[2 : 2 + height, 2 + shift : 2 + shift + width]
    return stays & beside
