"""`prumerge`: attention outliers, each with its nearest neighbours merged in (arXiv 2403.15388).

The patches CLS pays unusually much attention to (above Q3 + 1.5 IQR of their image) stay; each
takes in its most similar other patches by key, weighted by their attention, and one more token sums
up everything dropped.

The published arithmetic is the default, behind switches: one attention head of the whole encoder
width (`score`), raw weights that are not normalised (`normalise`), tokens in the order of their
attention (`order`). Not reproduced: published code takes the quartiles over the whole batch, ours
over each image, so a batch agrees with its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from itprune.calibration import Calibration, Recorder
from itprune.knee import inflection_count
from itprune.maths.merging import combine, combine_few, neighbours_of
from itprune.maths.patches import (
    PATCH_SCORES,
    patch_attention,
    patch_keys,
    place,
    split_features,
    with_free_slot,
)
from itprune.methods import register_method
from itprune.methods.base import Card, Method, Trial
from itprune.methods.fixed import fixed_count
from itprune.options import check_choice
from itprune.tokens import Images, Kept

STAGE = "before_llm"


@dataclass(frozen=True)
class PruMergeOptions:
    """Options of `prumerge`."""

    score: str = "full_width"
    """full_width: one attention head of the whole width, as published; attention: mean over the
    heads."""
    neighbours: int = 32
    """How many of its most similar patches each token takes in."""
    normalise: bool = False
    """Divide a merged token by the sum of its weights; off, as published: its own patch with weight
    1 plus the others with their raw attention."""
    order: str = "rank"
    """rank: by attention, as published; raster: each token in its own slot. The token of what was
    dropped is last."""

    def __post_init__(self) -> None:
        check_choice("prune.score", self.score, PATCH_SCORES)
        check_choice("prune.order", self.order, ("rank", "raster"))
        if self.neighbours < 0:
            raise ValueError(f"prune.neighbours: must not be negative, got {self.neighbours}")


@register_method("prumerge")
class PruMerge(Method):
    """Attention outliers with their neighbours merged in, and one token of the rest.

    An image whose attention has no outlier keeps its best patch. One whose attention is the same
    everywhere keeps all patches: nothing says which to drop. An image has at least two tokens,
    unless it is a single patch, and no token of the rest where nothing is dropped.
    """

    Options = PruMergeOptions
    card = Card(
        "attention outliers with similar patches merged in, one token for the rest",
        paper="2403.15388",
        count="dynamic",
        training="optional",
        needs=("cls",),
        notes="As published, but quartiles per image, not per batch, and an image without outliers "
        "keeps its best patch. With keep: the same share of every image, or calibrated, the rule's "
        "counts scaled. Without CLS: attention received.",
    )
    needs_patches = True
    places = ("before_llm",)
    positions = "contiguous"
    rule: ClassVar[str] = "iqr"

    @property
    def block(self) -> int:
        """The block after the feature block, whose input the features are; the last if none."""
        return min(self.host.feature_block + 1, self.host.vision_blocks - 1)

    def vision_blocks(self) -> tuple[int, ...]:
        return (self.block,)

    # ------------------------------------------------------------------------ which patches
    def by_rule(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """The published choice.

        Args:
            score: (n, P) attention.

        Returns:
            (n, P) bool, chosen by attention; (n, P) bool, chosen besides.
        """
        top = rank(score) < outliers(score)[:, None]
        return top, torch.zeros_like(top)

    def by_count(self, score: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The choice that makes `total` (n,) tokens of each image, that of the rest included."""
        top = rank(score) < (total - 1).clamp(min=1)[:, None]  # a single patch is no rest
        return top, torch.zeros_like(top)

    @property
    def repeats(self) -> bool:
        """Whether a patch chosen twice becomes two tokens."""
        return False

    @torch.no_grad()
    def choose(self, score: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """The choice at the target in force, as `by_rule` returns it.

        Without a target the published rule decides. With one and a calibration, the rule's counts
        are scaled; with a target alone every image keeps the same share of its `lens` (n,) tokens.
        """
        patches = score.shape[1]
        if self.keep is None or self.recorder is not None:
            top, besides = self.by_rule(score)
            if self.recorder is not None:
                made = _made(top, besides)
                self.recorder.add(STAGE, self.rule, made, torch.full_like(made, patches))
            return top, besides
        scale = None
        if self.calibrates and self.calibration is not None:
            scale = self.calibration.scale(STAGE, self.rule, self.keep)
        if scale is None:
            total = fixed_count(self.keep, lens) + patches - lens
        else:
            total = (_made(*self.by_rule(score)) * scale + 0.5).floor().long()
        return self.by_count(score, total.clamp(min=2).clamp(max=patches))

    # ------------------------------------------------------------------------ new tokens
    def before_llm(self, images: Images) -> Kept:
        score = patch_attention(images, self.block, self.options.score)
        leading, content = split_features(images, score.shape[1])
        top, besides = self.choose(score, images.lens)
        rows, real = self._merge(images, content, score, top, besides)
        stays = torch.ones_like(leading[..., 0], dtype=torch.bool)
        own = None
        if self.options.order == "raster" and not self.repeats:
            own = torch.cat([stays, with_free_slot(top | besides, last=True)], 1)
        rows, real = torch.cat([leading, rows], 1), torch.cat([stays, real], 1)
        return place(images, rows, real, own)

    def _merge(
        self, images: Images, content: Tensor, score: Tensor, top: Tensor, besides: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(n, K + 1, D) merged tokens and the one of the rest, (n, K + 1) bool which exist."""
        ids, real, repeated = self._order(score, top, besides)
        dropped = ~(top | besides)
        lost = None
        if self.repeats:
            twice = (top & besides).sum(1, keepdim=True)
            lost = dropped & (dropped.cumsum(1) <= twice)
            dropped = dropped & ~lost
        source, weights = neighbours_of(
            patch_keys(images, self.block).transpose(1, 2).flatten(2),
            score,
            ids,
            neighbours=self.options.neighbours,
            hidden=lost,
            repeated=repeated if self.repeats else None,
        )
        rows = combine_few(content, source, weights, self.options.normalise)
        rest = combine(content, (score * dropped)[:, None], self.options.normalise)
        real = torch.cat([real, dropped.any(1, keepdim=True)], 1)
        return torch.cat([rows, rest], 1), real

    def _order(self, score: Tensor, top: Tensor, besides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, K) patches in the order of the tokens, which exist, which repeat an earlier one."""
        patches = score.shape[1]
        place = torch.arange(patches, device=score.device).expand_as(top)
        raster = self.options.order == "raster"
        order = torch.cat([place if raster else rank(score), place + (not raster) * patches], 1)
        wanted = torch.cat([top, besides], 1)
        order = order.masked_fill(~wanted, 2 * patches)
        count = wanted.sum(1)
        column = order.argsort(dim=1, stable=True)[:, : int(count.max())]
        real = torch.arange(column.shape[1], device=score.device) < count[:, None]
        twice = torch.cat([torch.zeros_like(top), top & besides], 1)
        return column % patches, real, twice.gather(1, column)

    # ------------------------------------------------------------------------ calibration
    @property
    def calibrates(self) -> bool:
        return True

    @torch.no_grad()
    def calibrate(self, trial: Trial) -> Calibration:
        """Records what the rule makes of every calibration image.

        Raises:
            ValueError: no sample has an image, or the option in force has a fixed count.
        """
        if not self.calibrates:
            return super().calibrate(trial)
        self.recorder = Recorder()
        try:
            trial.run()
            found = self.recorder.finish()
        finally:
            self.recorder = None
        if STAGE not in found.curves:
            raise ValueError("calibration needs samples with images, and found none")
        return found


def rank(score: Tensor) -> Tensor:
    """(n, P) rank of each patch in its image, 0 = highest; ties go to the earlier patch."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def outliers(score: Tensor) -> Tensor:
    """(n,) scores of each image above Q3 + 1.5 IQR; at least 1, all where all are the same."""
    count, patches = score.shape
    image = torch.arange(count, device=score.device).repeat_interleave(patches)
    return inflection_count(score.flatten(), image, count, "iqr")


def _made(top: Tensor, besides: Tensor) -> Tensor:
    """(n,) tokens a choice makes, that of the rest included."""
    return top.sum(1) + besides.sum(1) + (~(top | besides)).any(1)
