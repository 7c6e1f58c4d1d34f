"""`uniform`: the control that keeps evenly spaced tokens in raster order."""

from __future__ import annotations

import torch

from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.methods.fixed import fixed_count
from itprune.tokens import Images, Kept, spread


@register_method("uniform")
class Uniform(Method):
    """Every so many tokens, whatever they show."""

    card = Card("control: evenly spaced tokens")
    places = ("before_llm",)

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        return Kept(spread(images.lens, fixed_count(self.keep, images.lens)))
