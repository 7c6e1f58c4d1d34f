"""`downsample`: the control that shrinks the image before the encoder sees it.

The cheapest way to fewer tokens, and the one a token pruner has to beat: the encoder gets faster,
too. Position embeddings are interpolated to the smaller grid.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.ragged import group_ids
from itprune.tokens import Images, Kept, fill, keep_all


@register_method("downsample")
class Downsample(Method):
    """A smaller picture: its tokens stand at the middle of the patches they cover."""

    card = Card(
        "control: the image is resized before the encoder",
        needs=("grid",),
        notes="Where an encoder takes images of one size only, its tokens are averaged instead.",
    )
    places = ("pixels", "before_llm")

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        if self.keep is None:
            raise ValueError("prune.keep: downsample needs a fraction in (0, 1]")
        side = self.keep**0.5
        return max(round(rows * side), 1), max(round(columns * side), 1)

    def before_llm(self, images: Images) -> Kept:
        """Puts token (i, j) of the small grid into the slot at the same place of the full one."""
        images = self._averaged(images)
        image = group_ids(images.lens)
        place = torch.arange(len(image), device=image.device)
        place = place - (images.lens.cumsum(0) - images.lens)[image]
        rows, columns = images.grid[image].unbind(1)
        full_rows, full_columns = images.slot_grid[image].unbind(1)
        before = images.lens[image] - rows * columns  # a CLS token stands before the patches
        patch = (place - before).clamp(min=0)
        row = _middle(torch.div(patch, columns, rounding_mode="floor"), rows, full_rows)
        column = _middle(patch % columns, columns, full_columns)
        slot = torch.where(place < before, place, before + row * full_columns + column)
        start = images.slots.cumsum(0) - images.slots
        keep = keep_all(images).keep.zero_().index_fill(0, start[image] + slot, True)
        return fill(images, keep, images.features)

    def _averaged(self, images: Images) -> Images:
        """The images on their small grids, whether the encoder made them so or not."""
        small = [self.grid(rows, columns) for rows, columns in images.slot_grid.tolist()]
        grid = images.grid.new_tensor(small).view(-1, 2)
        if torch.equal(grid, images.grid):
            return images
        parts = images.features.split(images.lens.tolist())
        own = images.grid.tolist()
        averaged = [_average(*each) for each in zip(parts, own, small, strict=True)]
        return dataclasses.replace(
            images, features=torch.cat(averaged), lens=grid.prod(1), grid=grid
        )


def _average(features: Tensor, grid: list[int], small: tuple[int, int]) -> Tensor:
    """(rows * columns, D) -> the means of the cells of a smaller grid, (count, D)."""
    table = features.T.reshape(1, -1, *grid)
    return F.adaptive_avg_pool2d(table, small)[0].flatten(1).T


def _middle(index: Tensor, count: Tensor, of: Tensor) -> Tensor:
    """Where the middle of cell `index` out of `count` lies on an axis of `of` cells."""
    return torch.div((2 * index + 1) * of, 2 * count, rounding_mode="floor")
