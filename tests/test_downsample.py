"""`downsample` on finished tokens: each kept slot holds the mean of the cells it stands for."""

from __future__ import annotations

import torch

from itprune.methods import build_method
from tests.handmade import HOST, WIDTH, image, images_of


def test_tokens_are_the_means_of_their_cells() -> None:
    """Grids that are no squares, each behind the other: content and place both tell the cell."""
    parts = [image(4, 6, seed=1), image(6, 2, seed=2)]
    for part in parts:
        rows, columns = part["grid"].tolist()
        cell = torch.arange(float(rows * columns))
        part["features"] = torch.stack([cell // columns, cell % columns], 1).repeat(1, WIDTH // 2)
    method = build_method("downsample", {}, HOST)
    method.share(0.25)
    kept = method.before_llm(images_of(*parts))
    means = kept.features[kept.keep][:, :2]
    expected = [[r, c] for r in (0.5, 2.5) for c in (0.5, 2.5, 4.5)]
    expected += [[r, 0.5] for r in (0.5, 2.5, 4.5)]
    assert means.tolist() == expected
    slots = [6 * r + c for r in (1, 3) for c in (1, 3, 5)] + [24 + 2 * r + 1 for r in (1, 3, 5)]
    assert kept.keep.nonzero()[:, 0].tolist() == slots
