"""Scenes of real handwritten digits: sampling and drawing, a whole batch at a time.

A scene is a 96 x 96 picture seen as a 4 x 4 grid of cells. Some cells hold one handwritten
digit (scikit-learn's `load_digits`) in one colour, turned, scaled and shifted a little; behind
them lies a low-contrast background of gradients, blobs and noise. Training and validation
scenes draw from disjoint handwritten sources.

The one idea: everything is drawn with array operations over the batch, so a training loop can
ask for fresh scenes at every step.

Shapes: B scenes, S digit slots of a scene (unused slots hold -1), M digits of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 40, 40),
    "green": (40, 205, 60),
    "blue": (60, 90, 255),
    "yellow": (245, 235, 50),
    "cyan": (50, 225, 235),
    "magenta": (235, 60, 225),
    "orange": (250, 145, 25),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
SIZE, CELL, GRID, PATCH = 96, 24, 4, 8
SPLIT_SEED, VAL_SHARE = 20240, 0.2

Array = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sources:
    """Handwritten digits one split may draw from: `images` (N, 8, 8) in 0..1, `labels` (N,)."""

    images: Array
    labels: Ints
    index: Ints


@dataclass(frozen=True)
class Scenes:
    """What is in each picture: cell 0..15, digit 0..9, colour index, source row; all (B, S)."""

    cell: Ints
    digit: Ints
    colour: Ints
    source: Ints

    def __len__(self) -> int:
        return len(self.cell)


@lru_cache(maxsize=2)
def sources(split: str) -> Sources:
    """The handwritten digits of `train` or `val`; the two share no source image."""
    from sklearn.datasets import load_digits

    if split not in ("train", "val"):
        raise ValueError(f"split {split!r} is not known; use 'train' or 'val'")
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    cut = int(len(order) * VAL_SHARE)
    index = np.sort(order[:cut] if split == "val" else order[cut:])
    images = (data.images[index] / 16.0).astype(np.float32)
    return Sources(images, data.target[index].astype(np.int64), index.astype(np.int64))


def sample_scenes(
    rng: np.random.Generator,
    count: int,
    split: str,
    digits: tuple[int, int] = (2, 6),
    repeats: float = 0.2,
) -> Scenes:
    """Choose cells, digits, colours and handwriting for `count` scenes.

    Args:
        digits: Fewest and most digits of a scene.
        repeats: Share of scenes in which a digit class or a colour may occur twice.
    """
    low, high = digits
    number = rng.integers(low, high + 1, size=count)
    slot = np.arange(high)[None, :]
    used = slot < number[:, None]
    cell = rng.random((count, GRID * GRID)).argsort(1)[:, :high]
    free = rng.random((count, 1)) < repeats
    digit = _distinct(rng, count, high, 10, free)
    colour = _distinct(rng, count, high, len(COLOURS), free)
    source = _pick_sources(rng, digit, sources(split).labels)
    return Scenes(*(np.where(used, value, -1) for value in (cell, digit, colour, source)))


def _distinct(
    rng: np.random.Generator, count: int, slots: int, classes: int, free: NDArray[np.bool_]
) -> Ints:
    """(count, slots) classes without repeats in a row, except rows marked free."""
    rounds = [rng.random((count, classes)).argsort(1) for _ in range(-(-slots // classes))]
    distinct = np.concatenate(rounds, 1)[:, :slots]
    return np.where(free, rng.integers(0, classes, (count, slots)), distinct)


def _pick_sources(rng: np.random.Generator, digit: Ints, labels: Ints) -> Ints:
    """For every slot a random source row of the slot's digit class."""
    order = np.argsort(labels, kind="stable")
    start = np.searchsorted(labels[order], np.arange(11))
    size = np.diff(start)
    return order[start[digit] + (rng.random(digit.shape) * size[digit]).astype(np.int64)]


def draw_scenes(
    rng: np.random.Generator, scenes: Scenes, split: str
) -> tuple[NDArray[np.uint8], Array]:
    """Draw the pictures.

    Returns:
        Pictures (B, 96, 96, 3) uint8 and the ink of each patch (B, 12, 12), a share in 0..1.
    """
    count = len(scenes)
    picture = _backgrounds(rng, count)
    cells = picture.reshape(count, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    cells = np.ascontiguousarray(cells).reshape(count, GRID * GRID, CELL, CELL, 3)
    row, slot = np.nonzero(scenes.cell >= 0)
    place = scenes.cell[row, slot]
    alpha = _glyphs(rng, sources(split).images[scenes.source[row, slot]])
    paint = np.array(list(COLOURS.values()), np.float32)[scenes.colour[row, slot]]
    paint = paint * rng.uniform(0.85, 1.0, (len(row), 1)).astype(np.float32)
    paint += rng.uniform(-12, 12, paint.shape).astype(np.float32)
    mix = alpha[..., None]
    cells[row, place] = cells[row, place] * (1 - mix) + mix * paint[:, None, None, :]
    ink = np.zeros((count, GRID * GRID, CELL, CELL), np.float32)
    ink[row, place] = alpha
    side = SIZE // PATCH
    whole = _ungrid(cells)
    patches = _ungrid(ink[..., None]).reshape(count, side, PATCH, side, PATCH).mean((2, 4))
    return np.clip(np.rint(whole), 0, 255).astype(np.uint8), patches


def _ungrid(cells: Array) -> Array:
    """(B, 16, 24, 24, C) cells to (B, 96, 96, C) pictures."""
    count, channels = len(cells), cells.shape[-1]
    grid = cells.reshape(count, GRID, GRID, CELL, CELL, channels).transpose(0, 1, 3, 2, 4, 5)
    picture: Array = np.ascontiguousarray(grid).reshape(count, SIZE, SIZE, channels)
    return picture


def _backgrounds(rng: np.random.Generator, count: int) -> Array:
    """Low-contrast textures: a dark tinted level, a gradient, smooth blobs and pixel noise."""
    level = rng.uniform(25, 90, (count, 1, 1, 1)).astype(np.float32)
    tint = rng.uniform(-12, 12, (count, 1, 1, 3)).astype(np.float32)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    slope = rng.uniform(-18, 18, (2, count, 1, 1, 1)).astype(np.float32)
    blobs = rng.uniform(-16, 16, (count, 7, 7, 3)).astype(np.float32)
    blobs = np.einsum("yi,bijc->byjc", _upsampler(7), blobs, optimize=True)
    blobs = np.einsum("xj,byjc->byxc", _upsampler(7), blobs, optimize=True)
    noise = rng.random((count, SIZE, SIZE, 1), dtype=np.float32) - 0.5
    grain = rng.uniform(4, 24, (count, 1, 1, 1)).astype(np.float32)
    gradient = slope[0] * ramp[None, :, None, None] + slope[1] * ramp[None, None, :, None]
    texture: Array = level + tint + gradient + blobs + noise * grain
    return texture


@lru_cache(maxsize=4)
def _upsampler(knots: int) -> Array:
    """(96, knots) weights of linear interpolation."""
    at = np.linspace(0, knots - 1, SIZE)
    near = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(knots)[None, :]))
    weights: Array = near.astype(np.float32)
    return weights


def _glyphs(rng: np.random.Generator, images: Array) -> Array:
    """(M, 8, 8) handwriting to (M, 24, 24) ink: turned, slanted, scaled, shifted in its cell."""
    count = len(images)
    size = rng.uniform(18.0, 21.5, (count, 1, 1)).astype(np.float32)
    angle = rng.uniform(-0.2, 0.2, (count, 1, 1)).astype(np.float32)
    shear = rng.uniform(-0.2, 0.2, (count, 1, 1)).astype(np.float32)
    stretch = rng.uniform(0.85, 1.15, (count, 1, 1)).astype(np.float32)
    room = (CELL - size) / 2
    dy = rng.uniform(-1, 1, size.shape).astype(np.float32) * room
    dx = rng.uniform(-1, 1, size.shape).astype(np.float32) * room
    axis = np.arange(CELL, dtype=np.float32) - (CELL - 1) / 2
    y, x = axis[None, :, None] - dy, axis[None, None, :] - dx
    scale = 8 / size
    cos, sin = np.cos(angle), np.sin(angle)
    v = (y * cos - x * sin) * scale + 3.5
    u = ((y * sin + x * cos) * stretch + y * shear) * scale + 3.5
    contrast = rng.uniform(1.15, 1.5, size.shape).astype(np.float32)
    ink: Array = np.clip(_bilinear(images, v, u) * contrast, 0, 1)
    return ink


def _bilinear(images: Array, v: Array, u: Array) -> Array:
    """Read (M, 8, 8) images at rows v and columns u, both (M, 24, 24); zero outside."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    edge = padded.shape[1] - 2
    v, u = np.clip(v + 2, 0, edge), np.clip(u + 2, 0, edge)
    top, left = v.astype(np.int64), u.astype(np.int64)
    fv, fu = v - top, u - left
    m = np.arange(len(images))[:, None, None]
    upper = padded[m, top, left] * (1 - fu) + padded[m, top, left + 1] * fu
    lower = padded[m, top + 1, left] * (1 - fu) + padded[m, top + 1, left + 1] * fu
    read: Array = (upper * (1 - fv) + lower * fv).astype(np.float32)
    return read
