"""`setok`: tokens that mean one thing become one token (SeTok, arXiv 2406.05127).

Density-peak clustering of the features finds each image's own number of groups; a small Transformer
mixes within a group, the group's mean becomes its token, and another one mixes between groups. A
token sits at its centre's place.

Published: the threshold decides how many (`keep: null`); tie-break noise (`seed`), which made the
number of tokens vary from run to run; a Linear to width 4096 before the projector, which the
projector's own first layer makes superfluous here; dropout 0.2 in the mixers, left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from itprune.host import Host
from itprune.maths.attending import Mixer, pad_rows
from itprune.maths.density_peaks import Clusters, density_peaks
from itprune.maths.grids import patch_rows, sine_positions
from itprune.methods import register_method
from itprune.methods.base import Card, Method
from itprune.methods.fixed import fixed_count
from itprune.options import check_positive
from itprune.tokens import Images, Kept, fill


@dataclass(frozen=True)
class SetokOptions:
    """Options of `setok`."""

    threshold: float = 0.55
    """Tokens whose density x separation is higher become centres; without a keep. Published: 0.55
    in training, 0.5 in the tokenizer's own defaults. Meant for the features of SigLIP-so400m."""
    neighbours: int = 64
    """Nearest tokens that make a token's density."""
    fallback: int = 64
    """Centres of an image without a score above the threshold."""
    seed: int | None = None
    """Seed of the published tie-break noise; null: no noise."""
    layers: int = 2
    """Attention layers within groups, and as many between them."""
    heads: int = 2
    """Attention heads of the mixers; must divide the vision encoder's width."""

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"prune.threshold: must not be negative, got {self.threshold}")
        for name in ("neighbours", "fallback", "layers", "heads"):
            check_positive(f"prune.{name}", getattr(self, name))


@register_method("setok")
class Setok(Method):
    """Clusters by density peaks, mixed and averaged."""

    Options = SetokOptions
    card = Card(
        "tokens clustered by density peaks; a trained mixer makes one token of each cluster",
        paper="2406.05127",
        count="dynamic",
        training="required",
        needs=("grid",),
        notes=(
            "Understanding only: the detokenizer and its reconstruction stage are left out. Into "
            "the model's own projector instead of a Linear to 4096 and a new MLP. Ours: a keep "
            "takes that share of the best-scored centres, fresh mixers return the plain means, the "
            "positions' weight in them is learned from 0 (published: 1), ties go by place (seed: "
            "the published noise), no dropout."
        ),
    )
    places = ("before_llm",)
    positions = "contiguous"

    def __init__(self, options: SetokOptions, host: Host) -> None:
        super().__init__(options, host)
        width = host.vision_width
        if width % options.heads:
            raise ValueError(
                f"prune.heads: {options.heads} does not divide the vision width {width}"
            )
        self.position = nn.Parameter(torch.zeros(width))
        """How much of the sine positions enters the mixers, by channel; 1 as published. From 0, so
        that a projector trained on bare features meets bare means first."""
        self.inner = Mixer(width, options.heads, options.layers)
        self.outer = Mixer(width, options.heads, options.layers)

    def vision_blocks(self) -> tuple[int, ...]:
        return ()

    def before_llm(self, images: Images) -> Kept:
        """One token per cluster, in raster order of the centres."""
        rows = patch_rows(images)
        lens = images.grid.prod(1)
        patches = images.features[rows]
        place = sine_positions(images.grid, patches.shape[1])
        found = self._cluster(patches, place, lens)
        keep = torch.zeros(len(images.features), dtype=torch.bool, device=rows.device)
        filled = found.nearest >= 0
        keep[rows] = found.centre[filled]
        merged = self._merge(patches.to(self.position.dtype), place, lens, found)
        return fill(images, keep, merged.to(patches.dtype))

    @torch.no_grad()
    def _cluster(self, patches: Tensor, place: Tensor, lens: Tensor) -> Clusters:
        table, filled = pad_rows(patches.float() + place, lens)
        options = self.options
        return density_peaks(
            table,
            filled,
            options.neighbours,
            options.threshold,
            options.fallback,
            count=None if self.keep is None else fixed_count(self.keep, lens),
            seed=options.seed,
        )

    def _merge(self, patches: Tensor, place: Tensor, lens: Tensor, found: Clusters) -> Tensor:
        """(V, D) patches -> (K, D) tokens of the clusters."""
        table, filled = pad_rows(patches + place.to(patches.dtype) * self.position, lens)
        group = found.nearest  # pads are a group of their own
        mixed = self.inner(table, group[:, :, None] == group[:, None, :])[filled]
        number = (found.centre.flatten().cumsum(0) - 1).view_as(group)
        number = number.gather(1, group.clamp(min=0))[filled]
        counts = found.centre.sum(1)
        means = group_means(mixed, number, int(counts.sum()))
        table, filled = pad_rows(means, counts)
        return self.outer(table, filled[:, :, None] == filled[:, None, :])[filled]


def group_means(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """(V, D) rows, (V,) groups 0..K-1 in any order -> (K, D) mean of each, differentiable."""
    size = torch.bincount(group, minlength=groups).to(rows.dtype)
    total = rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows)
    return total / size[:, None]
