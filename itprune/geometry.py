"""Geometry: where the visual tokens of one encoder call stand, and which patches made each.

A family works it out from the arguments of the call; the engine hands methods what follows from it.
A grid is one rectangle of tokens: an image, a tile, the mosaic of an image's tiles, a frame. A
separator is a slot that holds no part of an image, such as the newline behind a row of a mosaic.
Legend: n grids, V tokens on them, S slots (what the encoder call returns), P patches, R rows of the
encoder's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from itprune.ragged import group_ids, group_sizes


@dataclass(frozen=True)
class Geometry:
    """The tokens of one encoder call, grid after grid, each in raster order."""

    grid: Tensor
    """(n, 2) int64 rows and columns."""
    pool: Callable[[Tensor], Tensor]
    """(P,) float32 values of all patches in the encoder's own order, CLS left out -> (V,)."""
    source: Tensor
    """(R,) int64 the grid each row of the encoder's input (a tile, or a patch) belongs to."""
    slot: Tensor | None = None
    """(V,) int64 ascending; None: token i is slot i, and there are no separators."""
    separator: Tensor | None = None
    """(V,) int64 slot of the separator that goes with each token; -1 where there is none."""
    clip: Tensor | None = None
    """(n,) int64 ascending: the video each grid is a frame of; None: no videos."""
    place: Tensor | None = None
    """(V,) int64 which placeholder of the call each token fills; None: that of its slot. They
    differ where the host puts something behind what the call returns."""
    places: int | None = None
    """How many placeholders the call has; None: as many as slots."""

    @property
    def lens(self) -> Tensor:
        """(n,) tokens of each grid."""
        return self.grid.prod(1)

    def slots(self) -> Tensor:
        """(V,) the slot of each token."""
        if self.slot is not None:
            return self.slot
        return torch.arange(int(self.lens.sum()), device=self.grid.device)

    def by_clip(self) -> Geometry:
        """All frames of a video as one tall grid: they share one budget."""
        if self.clip is None:
            return self
        clips = int(self.clip.max()) + 1
        rows = torch.zeros_like(self.grid[:, 0]).new_zeros(clips)
        rows = rows.index_add(0, self.clip, self.grid[:, 0])
        first = group_sizes(self.clip, clips).cumsum(0) - group_sizes(self.clip, clips)
        grid = torch.stack([rows, self.grid[first, 1]], 1)
        return replace(self, grid=grid, source=self.clip[self.source], clip=None)

    def to(self, device: torch.device) -> Geometry:
        """The same on another device; `pool` takes and gives tensors where they are."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            grid=self.grid.to(device),
            source=self.source.to(device),
            slot=move(self.slot),
            separator=move(self.separator),
            clip=move(self.clip),
            place=move(self.place),
        )


def tiles(count: int, side: tuple[int, int], pool: Callable[[Tensor], Tensor]) -> Geometry:
    """`count` tiles of the same grid, one row of the encoder's input each."""
    return Geometry(torch.tensor([side]).expand(count, 2), pool, torch.arange(count))


def frames(thw: Tensor, merge: int, pool: Callable[[Tensor], Tensor], video: bool) -> Geometry:
    """Images or videos given as patches, `merge` x `merge` of which make one token.

    Args:
        thw: (m, 3) frames, rows and columns of patches of each image or video.
        merge: patches on a token's side.
        pool: see `Geometry`.
        video: the frames of one entry belong to one video.

    Raises:
        ValueError: a grid without patches.
    """
    if bool((thw < 1).any()) or bool((thw[:, 1:] % merge > 0).any()):
        raise ValueError(
            f"image grids {thw.tolist()} (frames, rows, columns of patches) must be positive "
            f"multiples of {merge}; check image_grid_thw and video_grid_thw"
        )
    each = thw[:, 1:].repeat_interleave(thw[:, 0], 0)
    return Geometry(
        grid=each // merge,
        pool=pool,
        source=group_ids(each.prod(1)),
        clip=group_ids(thw[:, 0]) if video else None,
    )
