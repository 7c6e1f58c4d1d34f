"""Recycling: some of the dropped tokens live on as the means of a few clusters.

The clustering is density peaks over k nearest neighbours: a centre is dense and far from everything
denser. Groups are ragged; a table padded to the largest group serves all of them at once.
Legend: N tokens, G groups, M most candidates of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itprune.ragged import group_sizes, pad_groups, rank_in_group
from itprune.tokens import Merge


@torch.no_grad()
def cluster_means(hidden: Tensor, candidate: Tensor, group: Tensor, count: Tensor) -> Merge:
    """Merges each group's candidates into `count` means, written to the clusters' centres.

    Distance is Euclidean over sqrt(D); density exp(-mean squared distance of the `count` nearest,
    a token itself among them); equally dense tokens rank by their order, where the published code
    adds noise.

    Args:
        hidden: (N, D) any float dtype; compared in float32.
        candidate: (N,) bool.
        group: (N,) ascending group ids.
        count: (G,) clusters, at most the group's candidates.

    Returns:
        One weight for each candidate; the targets are the centres.
    """
    groups = len(count)
    place = candidate.nonzero()[:, 0]
    if not len(place):
        return Merge(place, place, hidden.new_zeros(0, dtype=torch.float32))
    table, filled = pad_groups(place, group[place], groups, 0)
    rows = hidden[table].float()
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / hidden.shape[1] ** 0.5
    pair = filled[:, :, None] & filled[:, None]
    density = _density(distance.masked_fill(~pair, torch.inf), count)
    score = (_separation(distance, density, pair) * density)[filled]
    centre = rank_in_group(score, group[place], groups) < count[group[place]]
    centres = filled.clone()
    centres[filled] = centre
    nearest = distance.masked_fill(~centres[:, None], torch.inf).argmin(2)
    own = torch.arange(table.shape[1], device=table.device).expand_as(table)
    target = table.gather(1, torch.where(centres, own, nearest))
    chosen = filled & (count > 0)[:, None]
    source, target = table[chosen], target[chosen]
    weight = 1 / group_sizes(target, len(hidden)).clamp(min=1)
    return Merge(source, target, weight[target])


def _density(distance: Tensor, count: Tensor) -> Tensor:
    """(G, M) exp of minus the mean squared distance to the `count` nearest."""
    squared = distance.sort(2).values ** 2
    near = torch.arange(distance.shape[2], device=distance.device) < count[:, None, None]
    total = torch.where(near & squared.isfinite(), squared, 0.0).sum(2)
    return torch.exp(-total / count[:, None].clamp(min=1))


def _separation(distance: Tensor, density: Tensor, pair: Tensor) -> Tensor:
    """(G, M) distance to the nearest denser candidate; the densest: the largest distance at all."""
    order = torch.arange(density.shape[1], device=density.device)
    mine, other = density[:, :, None], density[:, None]
    denser = (other > mine) | ((other == mine) & (order[None] < order[:, None]))
    to_denser = distance.masked_fill(~(denser & pair), torch.inf).amin(2)
    largest = distance.masked_fill(~pair, 0.0).amax((1, 2))
    return torch.where(to_denser.isfinite(), to_denser, largest[:, None])
