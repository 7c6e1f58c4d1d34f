"""Kept: the choices of one forward as plain JSON, for a page that draws them over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from itprune.app.where import Spot
from itprune.trace import Trace


def kept_patches(trace: Trace, spots: Sequence[Spot]) -> dict[str, Any] | None:
    """What stays of one picture, stage by stage.

    Args:
        trace: of a forward of one sample with one picture.
        spots: where its tokens stand.

    Returns:
        {"grids": [{"rows", "columns", "box"}], "stages": [{"layer", "kept", "of", "masks"}]}; a
        mask is a text of 0 and 1 in raster order, one for each grid. Counts are of visual tokens,
        separators included. None: nothing was chosen.
    """
    if trace.visual is None:
        return None
    grids = [{"rows": s.rows, "columns": s.columns, "box": s.box} for s in spots]
    stages = [
        {
            "layer": layer,
            "kept": int(alive.sum()),
            "of": len(alive),
            "masks": [_mask(alive[spot.index]) for spot in spots],
        }
        for layer, alive in _segments(trace)
    ]
    return {"grids": grids, "stages": stages}


def _segments(trace: Trace) -> list[tuple[int, Tensor]]:
    """First layer of each segment that lost tokens, and (V,) visual tokens alive in it; the first
    segment always."""
    assert trace.visual is not None
    visual = trace.visual[0]
    every = [(layer, trace.alive[layer][0][visual].cpu()) for layer in sorted(trace.alive)]
    changed = [b for a, b in pairwise(every) if not torch.equal(a[1], b[1])]
    return every[:1] + changed


def _mask(alive: Tensor) -> str:
    return "".join("1" if one else "0" for one in alive.tolist())
