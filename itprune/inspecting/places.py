"""Places: where the visual tokens of one question stand on its pictures.

A grid of tokens lies on a picture, on one tile of it, or on the mosaic of all its tiles. A tile is
shown as the encoder saw it, made from its pixels; other grids lie on the picture as it was given.
Legend: V visual positions of the prompt, S slots, R rows of the encoder's input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from itprune.families.base import Family, PatchFamily, TokenFamily
from itprune.geometry import Geometry


@dataclass(frozen=True)
class Place:
    """One grid of visual tokens and the picture below it."""

    picture: Image.Image
    rows: int
    columns: int
    index: Tensor
    """(rows * columns,) which of the prompt's V visual positions each token fills."""
    token: Tensor
    """(rows * columns,) which entry of the trace's `score` and `keep` each token is."""
    seen: bool
    """The picture is what the encoder saw; False: as it was given."""


def find_places(
    family: Family, processor: Any, inputs: Mapping[str, Tensor], images: Sequence[Image.Image]
) -> list[Place]:
    """The grids of one question.

    Args:
        family: of the model.
        processor: whose image processor says how pixels were normalised.
        inputs: what it made of the question.
        images: the question's pictures.

    Returns:
        Grids in the order of the visual positions; none without pictures.
    """
    if "pixel_values" not in inputs:
        return []
    tiles = _tiles(inputs["pixel_values"])
    if isinstance(family, PatchFamily):
        return _patches(family, processor, inputs["pixel_values"])
    assert isinstance(family, TokenFamily)
    accepted = inspect.signature(family.model.base_model.get_image_features).parameters
    arguments = {k: v for k, v in inputs.items() if k in accepted}
    geometry = family.geometry("image", arguments).to(torch.device("cpu"))
    return _grids(geometry, processor, tiles, images)


def _patches(family: PatchFamily, processor: Any, pixels: Tensor) -> list[Place]:
    """One grid an image; what has no patch (a class token that is kept) stands before it."""
    rows, columns = family.grid(pixels)
    patches = rows * columns
    slots = int(family.slot_grids(2 * patches)[0][0])  # room for one that has a CLS beside it
    own = torch.arange(patches) + slots - patches
    pictures = [_picture(processor, pixels[i]) for i in range(len(pixels))]
    return [
        Place(picture, rows, columns, own + i * slots, own + i * slots, True)
        for i, picture in enumerate(pictures)
    ]


def _grids(
    geometry: Geometry, processor: Any, tiles: Tensor | None, images: Sequence[Image.Image]
) -> list[Place]:
    """The grids of a family whose tokens are made of patches, tiles and mosaics."""
    index = geometry.slots() if geometry.place is None else geometry.place
    whole = len(geometry.grid) == len(images)
    if tiles is None or len(tiles) != len(geometry.source):
        tiles = None
    places, start, image = [], 0, -1
    for i, (rows, columns) in enumerate(geometry.grid.tolist()):
        token = torch.arange(start, start + rows * columns)
        source = (geometry.source == i).nonzero()[:, 0]
        alone = tiles is not None and len(source) == 1
        # A mosaic follows the overview of its picture, so whatever is one tile opens a picture.
        image += int(alone or whole)
        if alone:
            assert tiles is not None
            picture = _picture(processor, tiles[source[0]])
        else:
            picture = images[min(max(image, 0), len(images) - 1)]
        places.append(Place(picture, rows, columns, index[token], token, alone))
        start += rows * columns
    return places


def _tiles(pixels: Tensor) -> Tensor | None:
    """(R, C, H, W) the tiles that are none of those which only fill up a batch; None: the pixels
    are no pictures."""
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    return pixels if pixels.ndim == 4 else None


def _picture(processor: Any, pixels: Tensor) -> Image.Image:
    """(C, H, W) normalised pixels as the picture they show."""
    part = processor.image_processor
    mean, std = (
        torch.tensor(v or default)[:, None, None]
        for v, default in ((part.image_mean, [0.0] * 3), (part.image_std, [1.0] * 3))
    )
    values = pixels.detach().float().cpu() * std + mean
    levels = (values * 255).round().clamp(0, 255).permute(1, 2, 0)
    return Image.fromarray(np.asarray(levels, dtype=np.uint8))
