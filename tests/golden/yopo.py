"""YOPO: which visual tokens of an image may attend to which."""

from __future__ import annotations

import torch
from torch import Tensor

from itprune.engine.scene import Scene, raster
from tests.golden import Golden, case


@case("yopo_window", "yopo.window5_allowed")
def window5(data: dict[str, Tensor], golden: Golden) -> Tensor:
    """The pairs that the groups of a lone 24 x 24 image compute and do not mask."""
    visual = torch.ones(1, 576, dtype=torch.bool)
    place = torch.arange(576)
    grids = raster(visual, torch.tensor([576]), torch.tensor([[24, 24]])).at(place)
    scene = Scene(place, torch.zeros_like(place), 1, visual[0], grids)
    allowed = torch.zeros(576, 576, dtype=torch.bool)
    for groups in scene.windowed(5):
        assert groups.mask is not None
        query = groups.query[:, :, None].expand(groups.mask[:, 0].shape)
        key = groups.key[:, None].expand(groups.mask[:, 0].shape)
        real = torch.zeros(groups.query.numel(), dtype=torch.bool)
        real[groups.take] = True
        pairs = groups.mask[:, 0] & real.view(groups.query.shape)[..., None]
        allowed[query[pairs], key[pairs]] = True
    return allowed
