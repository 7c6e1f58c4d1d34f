"""`prumerge_plus`: PruMerge with patches from all over the image added (PruMerge+, 2403.15388).

Outliers cluster on few objects, so as many again and more are taken on a grid before neighbours are
merged in. Two published ways to count: adaptive, where the grid's step follows the number of
outliers (about three grid patches for each), and the fixed one used for training, 1/8 of the
patches by attention and 1/8 on a grid.

Published behaviour behind a switch: `repeats` lets the fixed grid take patches that are chosen
already, which then are two tokens, and hides as many dropped patches, the first ones, from every
merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.prumerge import PruMerge, PruMergeOptions, outliers, rank
from itprune.options import check_choice

BRANCHES = ("adaptive", "fixed")
FIXED = 8
"""The fixed branch takes one patch in eight by attention and one in eight on the grid."""


@dataclass(frozen=True)
class PruMergePlusOptions(PruMergeOptions):
    """Options of `prumerge_plus`: those of `prumerge`, and two more."""

    branch: str = "adaptive"
    """adaptive: the grid follows the outliers; fixed: half by attention, half on a grid, a quarter
    of all patches unless keep says otherwise (published for training)."""
    repeats: bool = False
    """The fixed grid may take chosen patches again, as published; off: it takes others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prune.branch", self.branch, BRANCHES)
        if self.repeats and self.branch != "fixed":
            raise ValueError("prune.repeats: only the fixed branch repeats; set branch: fixed")


@register_method("prumerge_plus")
class PruMergePlus(PruMerge):
    """Attention outliers and a grid, neighbours merged in, and one token of the rest.

    An image without outliers counts as having one. Where outliers are more than a sixth of the
    patches the grid's step is 1: every patch stays, the last one as the token of the rest unless it
    is an outlier. The same holds where the attention is the same everywhere.
    """

    Options = PruMergePlusOptions
    card = Card(
        "attention outliers and an even grid, similar patches merged in, one token for the rest",
        paper="2403.15388",
        count="dynamic",
        training="optional",
        needs=("cls",),
        notes="As published in both branches (fixed: set repeats), but quartiles per image, no "
        "outlier counts as one, and the grid's step is at least 1 (published: division by zero). "
        "With keep: a quarter of the tokens by attention (fixed: half), the others on the grid.",
    )
    rule = "iqr+grid"

    @property
    def repeats(self) -> bool:
        return bool(self.options.repeats)

    @property
    def calibrates(self) -> bool:
        return self.options.branch == "adaptive"

    def by_rule(self, score: Tensor) -> tuple[Tensor, Tensor]:
        patches = score.shape[1]
        if self.options.branch == "fixed":
            total = torch.full_like(score[:, 0], 2 * max(1, patches // FIXED) + 1, dtype=torch.long)
            return self.by_count(score, total.clamp(max=patches))
        count = outliers(score)
        top = rank(score) < count[:, None]
        step = (patches // count // 3).clamp(min=1)
        place = torch.arange(patches, device=score.device)
        # The published grid stops one short of the last patch.
        grid = (place % step[:, None] == 0) & (place < patches - 1)
        return top, grid & ~top

    def by_count(self, score: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        part = 4 if self.options.branch == "adaptive" else 2
        chosen = (total - 1).clamp(min=1)  # a single patch is no rest
        by_attention = (chosen // part).clamp(min=1)
        top = rank(score) < by_attention[:, None]
        more = chosen - by_attention
        return top, even_grid(more, top) if self.repeats else even_others(more, top)


def even_grid(count: Tensor, top: Tensor) -> Tensor:
    """(n, P) bool: patches floor((i + 1/2) P / count), i < count, of each image."""
    patches = top.shape[1]
    place = torch.arange(patches + 1, device=top.device)
    # How many of them lie before a place: i + 1/2 < place * count / P.
    before = -((patches - 2 * place * count[:, None]) // (2 * patches))
    return before[:, 1:] > before[:, :-1]


def even_others(count: Tensor, top: Tensor) -> Tensor:
    """(n, P) bool: `count` (n,) evenly spaced ones of the patches that are not in `top`."""
    free = ~top
    size = free.sum(1, keepdim=True).clamp(min=1)
    upto, wanted = free.cumsum(1), count[:, None]
    return free & (upto * wanted // size > (upto - 1) * wanted // size)
