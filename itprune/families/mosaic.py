"""Mosaic: where tokens stand when a host packs an image's tiles into an overview and one mosaic.

The host's own packing says so: run on numbers in place of features, it shows what goes where.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from itprune.geometry import Geometry

Pack = Callable[[list[Tensor], Tensor], list[Tensor]]
"""(tiles, P, 1) maps of each image and the (1,) line end -> (slots, 1) of each image."""


def mosaic(pack: Pack, counts: list[int], side: tuple[int, int]) -> Geometry:
    """The geometry of images of one tile, or of an overview followed by a mosaic's tiles.

    The tokens of a mosaic's row go with the line end behind it, those of an image that is one tile
    with the line end behind the image. A mosaic the host leaves no token of has no grid.

    Args:
        pack: of the host.
        counts: tiles of each image.
        side: rows and columns of a tile.
    """
    patches = side[0] * side[1]

    def packed(values: Tensor) -> list[Tensor]:
        maps = list(values.view(-1, patches, 1).split(counts))
        return [image[:, 0] for image in pack(maps, values.new_full((1,), torch.nan))]

    def pool(values: Tensor) -> Tensor:
        return torch.cat(packed(values))[slots.to(values.device)]

    grid: list[tuple[int, int]] = []
    source: list[int] = []
    slot: list[Tensor] = []
    separator: list[Tensor] = []
    start = 0
    for image, count in zip(packed(torch.zeros(sum(counts) * patches)), counts, strict=True):
        ends, token = image.isnan().nonzero()[:, 0], (~image.isnan()).nonzero()[:, 0]
        lined = token >= (0 if count == 1 else patches)
        own = torch.full_like(token, -1)
        own[lined] = ends[torch.searchsorted(ends, token[lined])] + start
        grid.append(side)
        source.append(len(grid) - 1)
        if len(token) > patches:
            grid.append((len(ends), (len(token) - patches) // len(ends)))
        source += [len(grid) - 1] * (count - 1)
        slot.append(token + start)
        separator.append(own)
        start += len(image)
    slots = torch.cat(slot)
    return Geometry(
        grid=torch.tensor(grid),
        pool=pool,
        source=torch.tensor(source),
        slot=slots,
        separator=torch.cat(separator),
    )
