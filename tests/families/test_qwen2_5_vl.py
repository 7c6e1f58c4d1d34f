"""Qwen2.5-VL: windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.families import find_family
from tests.families.qwen import IMAGES, MERGE, VIDEOS, call, encode, family_of
from tests.family_models import build

WINDOW = 2
"""Tokens on a window's side: 16 pixels, of which a token has 8."""


def windowed(frame: Tensor) -> list[Tensor]:
    """Scores (h, w) of a frame's patches -> as the blocks have them: windows in raster order, the
    tokens of each in raster order, the patches of each in raster order."""
    h, w = frame.shape
    side = WINDOW * MERGE
    return [
        frame[row + i, column + j]
        for top in range(0, h, side)
        for left in range(0, w, side)
        for row in range(top, min(top + side, h), MERGE)
        for column in range(left, min(left + side, w), MERGE)
        for i in range(MERGE)
        for j in range(MERGE)
    ]


def test_the_last_block_that_sees_the_whole_picture_scores() -> None:
    assert family_of("qwen2_5_vl").feature_block == 1


@pytest.mark.parametrize("full", [[], [7], [-1]])
def test_windows_in_every_block_are_refused(full: list[int]) -> None:
    model = build("qwen2_5_vl")
    model.model.visual.fullatt_block_indexes = full
    with pytest.raises(ValueError, match="fullatt_block_indexes"):
        _ = find_family(model).feature_block


@pytest.mark.parametrize(("kind", "grids"), [("image", IMAGES), ("video", VIDEOS)])
def test_windows_are_undone(kind: str, grids: tuple[tuple[int, int, int], ...]) -> None:
    frames = [torch.randn(h, w) for t, h, w in grids for _ in range(t)]
    flat = torch.stack([score for frame in frames for score in windowed(frame)])
    geometry = family_of("qwen2_5_vl").geometry(kind, call(kind, grids))
    expected = [F.avg_pool2d(frame[None], MERGE).flatten() for frame in frames]
    torch.testing.assert_close(geometry.pool(flat), torch.cat(expected))


def test_windows_are_really_in_another_order() -> None:
    """The model sees patches as `windowed` has them: without this the test above proves little."""
    family = family_of("qwen2_5_vl")
    seen: list[Tensor] = []

    def look(module: object, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    arguments = call("image", ((1, 6, 10),))
    handle = family.blocks[0].register_forward_pre_hook(look)
    with torch.no_grad():
        encode(family, "image", arguments)
        embedded = family.tower.patch_embed(arguments["pixel_values"])
    handle.remove()
    # Row of the processor's order that each place of the raster holds.
    order = torch.arange(60).view(3, 5, MERGE, MERGE).transpose(1, 2).reshape(6, 10)
    rows = torch.stack(windowed(order))
    assert rows.tolist() != list(range(60))
    torch.testing.assert_close(seen[0], embedded[rows])
