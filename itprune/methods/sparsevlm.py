"""`sparsevlm`: visual tokens rated by the text that looks at them, dropped ones recycled
(arXiv 2410.04417).

- Raters: instruction tokens more similar than average to the image's tokens, by plain dot products
  of what entered the LLM.
- Score: attention the raters pay, mean over heads and raters, rotary phase included.
- Drops after layers 2, 6 and 15 of 32, counted from 0. `count: share` keeps fixed fractions, as the
  release after the publication does; `count: rank` is the publication's own rule: as many tokens as
  the rank of the raters' attention map, times `scale`, plus `bias`.
- Recycling: the best 30 % of what is dropped is clustered, ten to one, and goes on as means.

Published: the means stand behind the visual tokens, on top of the count. Here they stand where
their clusters' centres stood and are part of the count, so that `keep` is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.host import Host
from itprune.maths.recycle import cluster_means
from itprune.maths.schedule import bend_stages
from itprune.methods import register_method
from itprune.methods.base import Card
from itprune.methods.layered import Layered, alive, check_layers, check_share, keep_best
from itprune.options import check_choice, check_positive
from itprune.ragged import group_sizes, pad_groups, top_per_group
from itprune.tokens import Kept, LayerTokens

LAYERS, PUBLISHED_DEPTH = (2, 6, 15), 32
FRACTIONS = (300 / 576, 200 / 576, 110 / 576)
"""Of the visual tokens, in the released setting that averages 192 of 576."""
COUNTS = ("share", "rank")


@dataclass(frozen=True)
class SparseVLMOptions:
    """Options of `sparsevlm`."""

    layers: tuple[int, ...] | None = None
    """0-based layers after which tokens are dropped; null: 2, 6, 15 of 32, scaled to the model."""
    fractions: tuple[float, ...] | None = None
    """Share of the entering tokens kept after each of `layers`; null: from prune.keep."""
    count: str = "share"
    """share: the fractions; rank: the rank of the raters' attention map decides, not prune.keep."""
    scale: float = 13.5
    """count rank: tokens kept for each rank."""
    bias: float = 0.0
    """count rank: tokens kept besides."""
    recycle: float = 0.3
    """Share of the dropped tokens that is clustered; 0 switches recycling off."""
    cluster: int = 10
    """Tokens merged into one, on average."""

    def __post_init__(self) -> None:
        check_choice("prune.count", self.count, COUNTS)
        check_share("prune.recycle", self.recycle)
        check_positive("prune.cluster", self.cluster)
        if self.scale < 0:
            raise ValueError(f"prune.scale: must not be negative, got {self.scale}")
        for fraction in self.fractions or ():
            check_share("prune.fractions", fraction)


@register_method("sparsevlm")
class SparseVLM(Layered):
    """Text raters, three drops, recycled tokens."""

    Options = SparseVLMOptions
    card = Card(
        "tokens rated by the relevant words of the question, dropped ones recycled as means",
        paper="2410.04417",
        notes="Recycled means take the slots of their clusters' centres within the count, instead "
        "of slots behind the image on top of it. Raters are chosen anew at every drop, by the "
        "image tokens still alive (published: once, by all). count: rank is dynamic and ignores "
        "keep.",
    )
    positions = "contiguous"

    def __init__(self, options: SparseVLMOptions, host: Host) -> None:
        super().__init__(options, host)
        self.stages = _scaled(self.depth) if options.layers is None else options.layers
        check_layers(self.stages, self.depth)
        given = options.fractions
        if given is not None and len(given) != len(self.stages):
            raise ValueError(
                f"prune.fractions: needs one for each of the layers {list(self.stages)}, "
                f"got {len(given)}"
            )
        if given is not None and list(given) != sorted(given, reverse=True):
            raise ValueError(f"prune.fractions: must not rise, got {list(given)}")

    def plan(self) -> Mapping[int, float]:
        fractions = self.options.fractions
        if fractions is None:
            fractions = _usual(len(self.stages))
            if self.keep is not None and self.options.count == "share":
                fractions = bend_stages(fractions, self.stages, self.depth, self.keep, "sparsevlm")
        return dict(zip(self.stages, fractions, strict=True))

    @torch.no_grad()
    def after_layer(self, tokens: LayerTokens) -> Kept:
        raters = _raters(tokens)
        score, left = tokens.attention(raters), alive(tokens)
        if self.options.count == "share":
            count = self.count(tokens).minimum(left)
        else:
            rank = _attention_rank(tokens, raters)
            count = (rank * self.options.scale + self.options.bias).long().clamp(min=0)
            count = count.minimum((left - 1).clamp(min=0))  # as published: one goes at least
        pool, means = self._recycled(count, left - count)
        keep = keep_best(tokens, score, count - means)
        gone = ~keep & (means > 0)[tokens.sample]
        candidate = _best_of(gone, score, tokens, pool)
        merge = cluster_means(tokens.hidden, candidate, tokens.sample, means)
        keep[merge.target] = True
        return Kept(keep, merge=merge)

    def _recycled(self, count: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) tokens to cluster and (B,) means to make, no more than half of the count."""
        if self.options.recycle == 0:
            return torch.zeros_like(count), torch.zeros_like(count)
        pool = (dropped * self.options.recycle).long() + 1
        means = (pool // self.options.cluster + 1).minimum(pool).minimum(count // 2)
        return pool, torch.where(dropped > 0, means, 0)


def _scaled(depth: int) -> tuple[int, ...]:
    """The published layers in a model of another depth."""
    ends = (round((layer + 1) * depth / PUBLISHED_DEPTH) - 1 for layer in LAYERS)
    return tuple(sorted({min(max(end, 0), max(depth - 2, 0)) for end in ends}))


def _usual(stages: int) -> tuple[float, ...]:
    """The released fractions, or as many that fall evenly to the same end."""
    if stages == len(FRACTIONS):
        return FRACTIONS
    return tuple(FRACTIONS[-1] ** ((stage + 1) / stages) for stage in range(stages))


def _best_of(among: Tensor, score: Tensor, tokens: LayerTokens, count: Tensor) -> Tensor:
    """(N,) bool: the `count` best of the tokens `among`, per sample."""
    chosen = torch.zeros_like(among)
    chosen[among] = top_per_group(score[among], tokens.sample[among], count)
    return chosen


def _table(mask: Tensor, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
    """(B, M) indices of the masked tokens, and (B, M) where one stands."""
    place = mask.nonzero()[:, 0]
    return pad_groups(place, tokens.sample[place], tokens.samples, 0)


def _raters(tokens: LayerTokens) -> Tensor:
    """(N,) bool: instruction tokens more similar than average to the visual tokens."""
    entered = tokens.embedded().float()
    text, asked = _table(tokens.asks, tokens)
    image, seen = _table(tokens.visual, tokens)
    similar = entered[image] @ entered[text].transpose(1, 2)  # (B, V, Q)
    similar = torch.softmax(similar.masked_fill(~asked[:, None], -torch.inf), -1)
    share = (similar * seen[:, :, None]).sum(1) / seen.sum(1).clamp(min=1)[:, None]
    mean = (share * asked).sum(1) / asked.sum(1).clamp(min=1)
    above = (share > mean[:, None]) & asked
    above = torch.where(above.any(1, keepdim=True), above, asked)
    raters = torch.zeros_like(tokens.asks)
    raters[text[above]] = True
    return raters


def _attention_rank(tokens: LayerTokens, raters: Tensor) -> Tensor:
    """(B,) numerical rank of the head-mean attention of raters to visual tokens."""
    logits, filled = tokens.logits()
    width = logits.shape[-1]
    column = torch.arange(width, device=filled.device).expand_as(filled)[filled]  # (N,)
    place = raters.nonzero()[:, 0]
    row, rated = pad_groups(column[place], tokens.sample[place], tokens.samples, 0)
    heads = logits.shape[1]
    picked = logits.gather(2, row[:, None, :, None].expand(-1, heads, -1, width))
    attention = torch.softmax(picked, -1).mean(1).nan_to_num(0.0)  # (B, R, L)
    visual = filled.clone()
    visual[filled] = tokens.visual
    values = torch.linalg.svdvals(attention * rated[:, :, None] * visual[:, None])
    size = torch.maximum(rated.sum(1), group_sizes(tokens.sample[tokens.visual], tokens.samples))
    floor = values[:, :1].sum(1) * size * torch.finfo(values.dtype).eps
    return (values > floor[:, None]).sum(1)
