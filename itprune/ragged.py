"""Ragged groups as flat tensors: the few operations selection needs, without a Python loop.

A ragged batch is a flat tensor of N values and `group` (N,), ascending group ids 0..G-1: the image
or the sample each value belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_ids(lens: Tensor) -> Tensor:
    """(G,) lengths -> (N,) ascending group ids."""
    return torch.repeat_interleave(torch.arange(len(lens), device=lens.device), lens)


def group_sizes(group: Tensor, groups: int) -> Tensor:
    """(N,) group ids -> (G,) number of values in each group."""
    return torch.bincount(group, minlength=groups)


def rank_in_group(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """Rank of each value among its group, 0 = highest; ties go to the earlier value.

    Args:
        score: (N,) any float dtype.
        group: (N,) ascending group ids.
        groups: number of groups G.

    Returns:
        (N,) int64.
    """
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    size = group_sizes(group, groups)
    start = size.cumsum(0) - size
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start[group[order]]
    return rank


def top_per_group(score: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """Mask (N,) of the `count[g]` highest values of each group g; ties go to the earlier value."""
    return rank_in_group(score, group, len(count)) < count[group]


def pad_groups(values: Tensor, group: Tensor, groups: int, fill: float) -> tuple[Tensor, Tensor]:
    """(N,) ragged -> (G, M) table padded with `fill`, and (G, M) True where a value stands."""
    size = group_sizes(group, groups)
    width = int(size.max()) if groups else 0
    start = size.cumsum(0) - size
    column = torch.arange(len(values), device=values.device) - start[group]
    table = values.new_full((groups, width), fill)
    table[group, column] = values
    filled = torch.arange(width, device=values.device) < size[:, None]
    return table, filled


def group_min(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(G,) smallest value of each group, +inf for an empty group."""
    out = values.new_full((groups,), float("inf"))
    return out.scatter_reduce(0, group, values, "amin", include_self=True)
