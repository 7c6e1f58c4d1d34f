"""`topk_cls`: the control that keeps the same number of best-scored tokens of every image."""

from __future__ import annotations

import torch

from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.methods.fixed import fixed_count
from itprune.ragged import top_per_group
from itprune.tokens import Images, Kept


@register_method("topk_cls")
class TopkCls(Method):
    """Our stage-1 score without the inflection rule and without stage 2."""

    card = Card("control: the highest CLS attention, a fixed count", needs=("cls",))
    places = ("before_llm",)

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        count = fixed_count(self.keep, images.lens)
        return Kept(top_per_group(images.salience("attention"), images.image, count))
