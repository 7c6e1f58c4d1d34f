"""`divprune`: the most diverse subset of each image's tokens (after DivPrune, arXiv 2503.02175).

Max-min diversity by farthest points on the cosine distance of the projected features. The published
loop may pick a token twice where an image holds exact copies and then keeps fewer; ours never does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from itprune.maths.diversity import farthest_points
from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.methods.fixed import fixed_count
from itprune.options import check_choice
from itprune.tokens import Images, Kept

METRICS = ("projected", "features")
PUBLISHED_KEEP = 0.098
"""The budget of the published runs with LLaVA-1.5-7B."""


@dataclass(frozen=True)
class DivPruneOptions:
    """Options of `divprune`."""

    metric: str = "projected"
    """What distance is measured on: projected, as published, or features (spares the projector)."""

    def __post_init__(self) -> None:
        check_choice("prune.metric", self.metric, METRICS)


@register_method("divprune")
class DivPrune(Method):
    """Keeps tokens as far from each other as possible."""

    Options = DivPruneOptions
    card = Card(
        "max-min diversity of the projected features",
        paper="2503.02175",
        notes="As published, except that each image of a sample is treated on its own (published: "
        "all crops of a sample together) and no token is picked twice.",
    )
    places = ("before_llm",)
    positions = "contiguous"

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        features = images.features if self.options.metric == "features" else images.projected()
        count = fixed_count(PUBLISHED_KEEP if self.keep is None else self.keep, images.lens)
        return Kept(farthest_points(features, images.lens, count))
