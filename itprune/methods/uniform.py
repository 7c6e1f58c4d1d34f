"""`uniform`: the control that keeps evenly spaced tokens in raster order."""

from __future__ import annotations

import torch

from itprune.methods import register_method
from itprune.methods.base import Method
from itprune.methods.fixed import fixed_count
from itprune.tokens import Images, Kept


@register_method("uniform")
class Uniform(Method):
    """Token i stays where the running count floor((i + 1) k / n) steps up."""

    acts_before_llm = True

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        count = fixed_count(self.keep, images.lens)[images.image]
        length = images.lens[images.image]
        start = (images.lens.cumsum(0) - images.lens)[images.image]
        place = torch.arange(len(length), device=length.device) - start
        return Kept((place + 1) * count // length > place * count // length)
