"""`visionzip`: dominant tokens by CLS attention, the rest condensed (VisionZip, arXiv 2412.04467).

Dominant tokens are those CLS attends to most in the feature block. Of what is left, evenly strided
tokens become targets; each other token joins the target with the most similar key (mean over the
heads) and the members' mean goes into it: the contextual tokens.

Published behaviour behind switches: the members' mean is added to the target instead of averaged
with it (`merge: add`), CLS itself is one of the dominant tokens (`cls_token`), contextual tokens
follow all dominant ones (`order: grouped`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.maths.merging import combine, take, target_weights
from itprune.maths.patches import (
    mask_of,
    patch_attention,
    patch_keys,
    place,
    places_of,
    ranked,
    split_features,
    with_free_slot,
)
from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.options import check_choice
from itprune.tokens import Images, Kept


@dataclass(frozen=True)
class VisionZipOptions:
    """Options of `visionzip`."""

    dominant: int = 54
    """Dominant tokens of each image, CLS included; with keep, the two numbers are proportions."""
    contextual: int = 10
    """Contextual tokens of each image."""
    cls_token: bool = True
    """CLS is the first dominant token, as published; off: patches only."""
    merge: str = "add"
    """add: the members' mean is added to the target, as published; mean: target and members are
    averaged."""
    order: str = "grouped"
    """grouped: CLS, dominant, contextual, as published; raster: each token in its own slot."""

    def __post_init__(self) -> None:
        if self.dominant < 1 or self.contextual < 0:
            raise ValueError(
                "prune.dominant and prune.contextual: must be at least 1 and 0, got "
                f"{self.dominant} and {self.contextual}"
            )
        check_choice("prune.merge", self.merge, ("add", "mean"))
        check_choice("prune.order", self.order, ("grouped", "raster"))


@register_method("visionzip")
class VisionZip(Method):
    """Dominant tokens as they are, contextual tokens merged."""

    Options = VisionZipOptions
    card = Card(
        "dominant tokens by CLS attention, the rest merged into contextual ones",
        paper="2412.04467",
        training="optional",
        needs=("cls",),
        notes="As published, CLS included. Without CLS: mean attention received, patches only.",
    )
    needs_patches = True
    places = ("before_llm",)
    positions = "contiguous"

    def counts(self, slots: int, most: int) -> tuple[int, int]:
        """(dominant, contextual) tokens of an image with `slots` slots, together at most `most`."""
        options = self.options
        both = options.dominant + options.contextual
        total = both if self.keep is None else max(1, round(self.keep * slots))
        total = min(total, most)
        contextual = min(round(total * options.contextual / both), total - 1)
        return total - contextual, contextual

    def before_llm(self, images: Images) -> Kept:
        score = patch_attention(images, images.feature_block)
        leading, content = split_features(images, score.shape[1])
        cls = self._cls(images, leading)
        slots = leading.shape[1] + content.shape[1]
        most = content.shape[1] + min(cls.shape[1], leading.shape[1])
        dominant, contextual = self.counts(slots, most)
        top = mask_of(ranked(score, dominant - cls.shape[1]), content.shape[1])
        own, rest = places_of(top), places_of(~top)
        stride = rest.shape[1] // max(contextual, 1)
        targets = torch.arange(contextual, device=rest.device) * stride
        merged = self._contextual(images, take(content, rest), rest, targets)
        rows = torch.cat([take(content, own), merged], 1)
        ids = torch.cat([own, rest[:, targets]], 1)
        slots_used = None
        if self.options.order == "raster":
            rows = take(rows, ids.argsort(1))
            slots_used = _own_slots(mask_of(ids, content.shape[1]), cls, leading)
        rows = torch.cat([cls, rows], 1)
        return place(images, rows, rows.new_ones(rows.shape[:2], dtype=torch.bool), slots_used)

    def _cls(self, images: Images, leading: Tensor) -> Tensor:
        """(n, 1, D) the CLS feature, (n, 0, D) where it is not wanted or there is none."""
        if not (images.has_cls and self.options.cls_token):
            return leading[:, :0]
        if leading.shape[1]:
            return leading
        return images.block(images.feature_block).hidden[:, :1].to(leading)

    def _contextual(self, images: Images, content: Tensor, rest: Tensor, targets: Tensor) -> Tensor:
        """(n, C, D) targets and what is assigned to them, of the (n, R, D) tokens left over."""
        if not len(targets):
            return content[:, :0]
        metric = take(patch_keys(images, images.feature_block).mean(1), rest)
        weights = target_weights(metric, targets, include=self.options.merge == "mean")
        return combine(content, weights)


def _own_slots(used: Tensor, cls: Tensor, leading: Tensor) -> Tensor:
    """(n, slots) bool from (n, P): CLS has its own slot, or else takes the first free one."""
    if leading.shape[1]:
        return torch.cat([torch.full_like(used[:, :1], bool(cls.shape[1])), used], 1)
    return with_free_slot(used, last=False) if cls.shape[1] else used
