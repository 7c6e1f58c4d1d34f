"""Trace: the choices of one forward in detail, for pictures and debugging."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Trace:
    """Filled by the last forward with images while tracing.

    Legend: V visual tokens of all images, n images, B samples, S virtual length.
    """

    score: Tensor | None = None
    """(V,) the score stage 1 chose by, image after image."""
    lens: Tensor | None = None
    """(n,) visual tokens of each image."""
    keep: Tensor | None = None
    """(V,) bool, what stage 1 kept."""
    grid: Tensor | None = None
    """(n, 2) rows and columns of each image."""
    visual: Tensor | None = None
    """(B, S) bool, visual positions."""
    alive: dict[int, Tensor] = field(default_factory=dict)
    """First layer of each segment -> (B, S) bool, positions alive from there on."""
