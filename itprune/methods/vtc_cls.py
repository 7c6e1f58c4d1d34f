"""`vtc_cls`: keep what CLS attends to over several encoder blocks (VTC-CLS, arXiv 2412.05819).

Different blocks look at different things, so the score adds up the CLS attention of the blocks from
`start_block` to the feature block; the highest stay, in raster order, unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.methods import register_method
from itprune.methods.base import Card, Host, Method
from itprune.methods.fixed import fixed_count
from itprune.options import check_positive
from itprune.ragged import top_per_group
from itprune.tokens import Images, Kept


@dataclass(frozen=True)
class VtcClsOptions:
    """Options of `vtc_cls`."""

    start_block: int | None = None
    """First encoder block whose attention counts. null: two thirds of the depth, which is the
    published 16 of 24."""
    tokens: int = 128
    """Tokens of each image when keep is null; published for 64, 128 and 256."""

    def __post_init__(self) -> None:
        check_positive("prune.tokens", self.tokens)


@register_method("vtc_cls")
class VtcCls(Method):
    """Sum of head-mean CLS attention over encoder blocks, the highest in raster order."""

    Options = VtcClsOptions
    card = Card(
        "the highest CLS attention, added up over several encoder blocks",
        paper="2412.05819",
        needs=("cls",),
        notes="As published. Without CLS: mean attention received.",
    )
    places = ("before_llm",)
    positions = "contiguous"

    def __init__(self, options: VtcClsOptions, host: Host) -> None:
        super().__init__(options, host)
        last = host.feature_block
        start = options.start_block
        if start is not None and not 0 <= start <= last:
            raise ValueError(
                f"prune.start_block: must lie in 0..{last}, since the features are the output of "
                f"encoder block {last}; got {start}"
            )
        self.start = min(host.vision_blocks * 2 // 3, last) if start is None else start

    def vision_blocks(self) -> tuple[int, ...]:
        return tuple(range(self.start, self.host.feature_block + 1))

    @torch.no_grad()
    def score(self, images: Images) -> Tensor:
        """(V,) float32, higher = keep."""
        total = images.token_score("attention", self.start)
        for block in self.vision_blocks()[1:]:
            total = total + images.token_score("attention", block)
        return total

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        score = self.score(images)
        if self.keep is None:
            count = images.lens.clamp(max=self.options.tokens)
        else:
            count = fixed_count(self.keep, images.lens)
        return Kept(top_per_group(score, images.image, count))
