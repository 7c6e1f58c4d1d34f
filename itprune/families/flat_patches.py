"""Pictures as rows of patches, and back: how Qwen's processors lay pixels out.

A row is one patch: its C channels, T frames and P x P pixels, flattened. The patches of one visual
token follow each other, row by row; tokens stand in raster order, merged frame after merged frame.
Legend: t, h, w merged frames, rows and columns of patches; M patches on a token's side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlatPatches:
    """The layout of one model."""

    channels: int
    frames: int
    """T, merged into one patch."""
    side: int
    """P, pixels."""
    merge: int
    """M."""

    @property
    def width(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames * self.side**2

    def pictures(self, patches: Tensor, thw: tuple[int, int, int]) -> Tensor:
        """(t·h·w, C·T·P·P) -> (t·T, C, h·P, w·P)."""
        t, h, w = thw
        m, p = self.merge, self.side
        cut = patches.view(t, h // m, w // m, m, m, self.channels, self.frames, p, p)
        return cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, self.channels, h * p, w * p)

    def patches(self, pictures: Tensor) -> Tensor:
        """(t·T, C, h·P, w·P) -> (t·h·w, C·T·P·P)."""
        m, p = self.merge, self.side
        h, w = pictures.shape[-2] // p, pictures.shape[-1] // p
        cut = pictures.view(-1, self.frames, self.channels, h // m, m, p, w // m, m, p)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, self.width)
