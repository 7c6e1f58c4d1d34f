"""AIM's merging and importance, CDPruner's choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.maths.bipartite import bipartite_merging
from itprune.maths.diversity import determinant_points
from itprune.methods.aim import importance
from itprune.methods.cdpruner import stretched
from itprune.ragged import group_ids
from tests.golden import Golden, case


def _merged(x: Tensor, count: int) -> Tensor:
    lens = torch.tensor([x.shape[1]])
    return bipartite_merging(x[0], lens, torch.tensor([count])).apply(x[0])[None]


@case("functional", "aim.merge_50")
def merge_50(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return _merged(data["aim.x"], data["aim.x"].shape[1] // 2)


@case("functional", "aim.merge_25")
def merge_25(data: dict[str, Tensor], golden: Golden) -> Tensor:
    return _merged(data["aim.x"], data["aim.x"].shape[1] // 4)


@case("functional", "aim.importance")
def aim_importance(data: dict[str, Tensor], golden: Golden) -> Tensor:
    logits = data["aim.logits"]
    filled = torch.ones(logits.shape[0], logits.shape[-1], dtype=torch.bool)
    return importance(logits, filled, temperature=0.1, steps=5, damping=0.0)


@case("functional", "cdpruner.kept_32")
def cdpruner(data: dict[str, Tensor], golden: Golden) -> Tensor:
    features = data["cdpruner.features"]
    images, tokens = features.shape[:2]
    lens, count = torch.full((images,), tokens), torch.full((images,), 32)
    image_side = F.normalize(data["cdpruner.image_embeds"], dim=-1)
    text_side = F.normalize(data["cdpruner.text_embeds"], dim=-1)
    relevance = -(image_side @ text_side.T).mean(-1)
    quality = stretched(relevance.flatten(), group_ids(lens), "batch")
    keep = determinant_points(features.flatten(0, 1), lens, count, quality)
    return keep.view(images, tokens)
