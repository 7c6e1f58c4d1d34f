"""Patches on a grid, ragged: where each token lies, its block, its sine code.

Images of one forward may have different grids; everything here is flat, (V, …) tokens in raster
order, image after image, and `grid` (n, 2) rows and columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from itprune.ragged import group_ids
from itprune.tokens import Images


def patch_rows(images: Images) -> Tensor:
    """(V,) rows of `images.features` that hold patches: a CLS among the visual tokens is left out.

    Raises:
        ValueError: the visual tokens are not the patches of a grid.
    """
    leading = images.lens - images.grid.prod(1)
    if bool(((leading < 0) | (leading > 1)).any()):
        raise ValueError(
            f"prune.method: needs visual tokens that form a grid, and here {images.grid.tolist()} "
            f"patches became {images.lens.tolist()} tokens; choose a method that needs no grid"
        )
    image = images.image
    start = images.lens.cumsum(0) - images.lens
    place = torch.arange(len(image), device=image.device) - start[image]
    return (place >= leading[image]).nonzero()[:, 0]


def grid_places(grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 2) -> image, row and column of each token, three times (V,) int64."""
    lens = grid.prod(1)
    image = group_ids(lens)
    start = lens.cumsum(0) - lens
    place = torch.arange(len(image), device=grid.device) - start[image]
    columns = grid[image, 1]
    return image, place // columns, place % columns


def block_order(grid: Tensor, kernel: int) -> Tensor:
    """(V,) tokens sorted block by block: `kernel`² of a block in raster order, blocks likewise.

    Args:
        grid: (n, 2) rows and columns, each a multiple of `kernel`.
        kernel: side of a block.
    """
    image, row, column = grid_places(grid)
    lens = grid.prod(1)
    start = lens.cumsum(0) - lens
    block = row // kernel * (grid[image, 1] // kernel) + column // kernel
    inside = row % kernel * kernel + column % kernel
    target = start[image] + block * kernel**2 + inside
    return torch.empty_like(target).index_copy(0, target, torch.arange(len(target)).to(target))


def sine_positions(grid: Tensor, width: int) -> Tensor:
    """(V, width) float32: sines and cosines, alternating, of the row in the first half, the column
    in the second; wavelengths from 2 π to 20000 π."""
    _, row, column = grid_places(grid)
    half = 2 * math.ceil(width / 4)
    exponent = torch.arange(0, half, 2, device=grid.device) / half
    frequency = 10000.0**-exponent

    def code(place: Tensor) -> Tensor:
        angle = place[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    return torch.cat([code(row), code(column)], 1)[:, :width]
