"""Scene: where the visual tokens of a layer stand, and which queries can share their keys.

Attention with a window inside each image is computed in groups. All queries of one group attend to
one gathered set of keys under one small mask, so a group is one entry of a batched kernel call:

- a few grid rows of an image and the rows within reach of their window, with what stands before
  the image;
- the tokens of one sample that are on no grid, and everything before them.

Everything here depends on where tokens stand alone, so one forward computes it once.
Legend: N tokens alive, sample after sample; G groups of at most Q queries and K keys; B rows and L
columns of the tensors a layer sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.ragged import group_sizes, pad_groups

MOST_COPIES = 3
"""How many keys more than its own a block of rows may gather for each of its tokens: what stands
before an image is a key of all its blocks."""
ALIGNED = 8
"""Masks of a multiple of this width suit the kernels of GPUs."""


@dataclass(frozen=True)
class Raster:
    """Where visual tokens stand on the grids of their images; -1 off every grid."""

    image: Tensor
    """Any shape, int64: which image of the forward."""
    row: Tensor
    column: Tensor

    def at(self, index: Tensor) -> Raster:
        """Some of the tokens, by their index in the flattened tensors."""
        return Raster(*(t.reshape(-1)[index] for t in (self.image, self.row, self.column)))


def raster(visual: Tensor, slots: Tensor, grid: Tensor) -> Raster:
    """Places the visual tokens of a sequence on the grids of their images.

    Args:
        visual: (B, S) bool, the images' positions, image after image.
        slots: (n,) positions of each image.
        grid: (n, 2) rows and columns of each image. Positions of an image beyond rows * columns
            stand first in it (a class token) and are on no grid.

    Returns:
        A raster of (B, S) tensors.

    Raises:
        ValueError: the images do not have as many positions as the sequence has visual tokens.
    """
    place = visual.reshape(-1).nonzero()[:, 0]
    if int(slots.sum()) != len(place):
        raise ValueError(
            f"prune.window: the sequence has {len(place)} visual tokens, the images' grids have "
            f"{int(slots.sum())}; leave prune.window null for this model"
        )
    image = torch.repeat_interleave(torch.arange(len(slots), device=slots.device), slots)
    number = torch.arange(len(image), device=slots.device) - (slots.cumsum(0) - slots)[image]
    number = number - (slots - grid.prod(1))[image]
    on, columns = number >= 0, grid[:, 1][image]
    out = []
    for value in (image, torch.div(number, columns, rounding_mode="floor"), number % columns):
        table = torch.full_like(visual.reshape(-1), -1, dtype=torch.long)
        table[place] = torch.where(on, value, -1).to(table.device)
        out.append(table.view_as(visual))
    return Raster(*out)


@dataclass(frozen=True)
class Groups:
    """Queries that share keys. Indices are physical: b * L + l."""

    query: Tensor
    """(G, Q) int64."""
    key: Tensor
    """(G, K) int64."""
    mask: Tensor | None
    """(G, 1, Q, K) bool, True = seen; None: query i sees keys 0..i."""
    take: Tensor
    """(M,) which of the G * Q queries are no filling."""
    put: Tensor
    """(M,) where their results belong."""


@dataclass(frozen=True)
class Scene:
    """The tokens alive at a layer."""

    place: Tensor
    """(N,) physical index of each token."""
    sample: Tensor
    """(N,) ascending."""
    samples: int
    visual: Tensor
    """(N,) bool."""
    raster: Raster | None
    """(N,) where they stand; None: no window is asked for."""

    # ------------------------------------------------------------------------ samples
    @cached_property
    def _start(self) -> Tensor:
        """(B,) index of each sample's first token."""
        size = group_sizes(self.sample, self.samples)
        return size.cumsum(0) - size

    @cached_property
    def everything(self) -> tuple[Groups, ...]:
        """Plain causal attention within each sample."""
        return (self._causal(torch.ones_like(self.visual)),)

    @cached_property
    def among_text(self) -> tuple[Groups, ...]:
        """Text attends to text only; visual tokens attend to nothing."""
        return (self._causal(~self.visual),)

    def _causal(self, part: Tensor) -> Groups:
        """Causal attention of some tokens of each sample among themselves."""
        index = part.nonzero()[:, 0]
        table, filled = pad_groups(index, self.sample[index], self.samples, 0)
        query = self.place[table]
        return self._groups(query, query, filled, None)

    # ------------------------------------------------------------------------ windows
    def windowed(self, window: int) -> tuple[Groups, ...]:
        """Tokens on a grid see a window of their image and all before it; others are causal.

        Args:
            window: odd width of the window.
        """
        assert self.raster is not None
        on = self.raster.image >= 0
        index = on.nonzero()[:, 0]
        if not len(index):
            return self.everything
        image = torch.unique_consecutive(self.raster.image[index], return_inverse=True)[1]
        size = group_sizes(image, int(image[-1]) + 1)
        end = size.cumsum(0)
        solid = index[end - 1] - index[end - size] + 1 == size
        if not bool(solid.all()):  # separators between the rows of a grid
            return (self._masked(on.new_ones(len(on)), window // 2),)
        return self._masked(~on, window // 2), self._blocks(index, image, size, window // 2)

    def _masked(self, part: Tensor, reach: int) -> Groups:
        """Some queries of each sample with all its keys under an explicit mask."""
        assert self.raster is not None
        index = torch.arange(len(part), device=part.device)
        key, key_filled = pad_groups(index, self.sample, self.samples, 0)
        key, key_filled = _align(key), _align(key_filled)
        query, filled = pad_groups(index[part], self.sample[part], self.samples, 0)
        mask = key[:, None] <= query[:, :, None]
        if bool((self.raster.image[part] >= 0).any()):
            inside = same_image(self.raster.at(query), self.raster.at(key))
            mask = torch.where(inside, self._within(query, key, reach), mask)
        mask = mask & key_filled[:, None]
        return self._groups(self.place[query], self.place[key], filled, mask)

    def _blocks(self, index: Tensor, image: Tensor, size: Tensor, reach: int) -> Groups:
        """Blocks of grid rows see the rows in reach and what stands before their image.

        Args:
            index: (V,) the tokens on grids, every image without a gap.
            image: (V,) which image, numbered from 0 without a gap.
            size: (n,) tokens of each image.
            reach: rows and columns to each side.
        """
        assert self.raster is not None
        row, images = self.raster.row[index], len(size)
        height = int(row.max()) + 1
        first = index[size.cumsum(0) - size]
        start = self._start[self.sample[first]]
        width = int(self.raster.column[index].max()) + 1
        tall = _tall(int((first - start).max()), height, width, reach)

        blocks = -(-height // tall)
        group, owner = torch.unique_consecutive(image * blocks + row // tall, return_inverse=True)
        top, of = group % blocks * tall, torch.div(group, blocks, rounding_mode="floor")
        query, filled = pad_groups(index, owner, len(group), 0)
        rows = torch.bincount(image * (height + 1) + row + 1, minlength=images * (height + 1))
        edge = rows.view(images, -1).cumsum(1) + first[:, None]  # where each grid row begins
        low, high = (top - reach).clamp(min=0), (top + tall + reach).clamp(max=height)
        near, near_filled = _ranges(edge[of, low], edge[of, high])
        far, far_filled = _ranges(start[of], first[of])
        seen = self._within(query, near, reach) & near_filled[:, None]
        mask = torch.cat([seen, far_filled[:, None].expand(-1, seen.shape[1], -1)], 2)
        key = self.place[torch.cat([near, far], 1)]
        return self._groups(self.place[query], _align(key), filled, _align(mask))

    def _within(self, query: Tensor, key: Tensor, reach: int) -> Tensor:
        """(G, Q, K) whether keys (G, K) stand in the window of queries (G, Q)."""
        assert self.raster is not None
        return within(self.raster.at(query), self.raster.at(key), reach)

    def _groups(self, query: Tensor, key: Tensor, filled: Tensor, mask: Tensor | None) -> Groups:
        take = filled.reshape(-1).nonzero()[:, 0]
        if mask is not None:
            mask = (mask | ~filled[:, :, None])[:, None]  # fillings see something: no NaN
        return Groups(query, key, mask, take, query.reshape(-1)[take])


def _tall(before: int, height: int, width: int, reach: int) -> int:
    """Grid rows to a block: few, so that little of a block's keys is out of its rows' window, but
    enough that the keys all blocks share are not gathered too often."""
    tall = -(-(before + 2 * reach * width) // (MOST_COPIES * width))
    return min(max(tall, 1), height)


def within(query: Raster, key: Raster, reach: int) -> Tensor:
    """Whether keys stand in the window of queries, rows and columns apart by at most `reach`.

    Args:
        query: (G, Q) on grids.
        key: (G, K) on grids of the same images.
        reach: half the window's width, rounded down.

    Returns:
        (G, Q, K) bool.
    """
    rows = (query.row[:, :, None] - key.row[:, None]).abs()
    columns = (query.column[:, :, None] - key.column[:, None]).abs()
    return (rows <= reach) & (columns <= reach)


def same_image(query: Raster, key: Raster) -> Tensor:
    """(G, Q, K) whether queries (G, Q) and keys (G, K) are on the grid of one image."""
    return (query.image[:, :, None] == key.image[:, None]) & (query.image >= 0)[:, :, None]


def _align(table: Tensor) -> Tensor:
    """Fills the last dimension up with zeros."""
    return F.pad(table, (0, -table.shape[-1] % ALIGNED))


def _ranges(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) bounds -> (G, K) low, low + 1, … and (G, K) True below `high`; fillings repeat 0."""
    length = high - low
    step = torch.arange(int(length.max()), device=low.device)
    filled = step < length[:, None]
    return torch.where(filled, low[:, None] + step, 0), filled
