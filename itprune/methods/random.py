"""`random`: the control that keeps a seeded random subset of each image's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.methods.fixed import fixed_count
from itprune.ragged import top_per_group
from itprune.tokens import Images, Kept


@dataclass(frozen=True)
class RandomOptions:
    """Options of `random`."""

    seed: int = 0
    """Another seed, another subset; the same image always gets the same one."""


@register_method("random")
class Random(Method):
    """The subset depends on seed and pixels only, so a batch and its rows agree."""

    Options = RandomOptions
    card = Card("control: a seeded random subset")
    places = ("before_llm",)

    @torch.no_grad()
    def before_llm(self, images: Images) -> Kept:
        draws = []
        for fingerprint, length in zip(
            images.fingerprint.tolist(), images.lens.tolist(), strict=True
        ):
            generator = torch.Generator().manual_seed(
                (self.options.seed * 1_000_003 + fingerprint) % 2**63
            )
            draws.append(torch.rand(length, generator=generator))
        score = torch.cat(draws).to(images.features.device)
        return Kept(top_per_group(score, images.image, fixed_count(self.keep, images.lens)))
