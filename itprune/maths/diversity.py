"""Choosing a diverse subset: two greedy algorithms, for a ragged batch of images at once.

Both measure tokens by cosine similarity and pick one token of every image per step; the loop runs
over steps alone. `farthest_points` is the max-min diversity of DivPrune (arXiv 2503.02175);
`determinant_points` is greedy maximum-a-posteriori inference in a determinantal point process, with
the qualities that CDPruner (arXiv 2506.10967) conditions it on.

Keeping 127 of each of 8 x 576 tokens of width 1024 takes 61 ms (farthest) and 67 ms (determinant)
on one core of an AMD EPYC, 56 ms of it for the similarities both begin with.
Legend: V tokens of n images, M the largest image, W feature width, T the largest count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itprune.ragged import group_ids, pad_groups

EXPLAINED = 1e-5
"""Share of a vector's variance below which float32 rounding (about 1e-6) may decide."""


@torch.no_grad()
def farthest_points(features: Tensor, lens: Tensor, count: Tensor) -> Tensor:
    """Farthest-point selection on cosine distance.

    The first pick is the token whose nearest neighbour is farthest, each later one the token
    farthest from its nearest pick; ties go to the earlier token.

    Args:
        features: (V, W) any float dtype.
        lens: (n,) int64 tokens of each image.
        count: (n,) int64 how many of them.

    Returns:
        (V,) bool. Costs n M² W multiplications for the distances and n M for each of T steps; one
        synchronisation with the device.
    """
    similar, filled = _similarity(features, lens)
    distance = similar.neg_().add_(1).clamp_(min=0)
    # Neither a token itself nor a pad is a neighbour; later steps read neither.
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    distance.masked_fill_(~filled[:, None], torch.inf)
    score = distance.amin(2)
    score = score.masked_fill(~filled, -torch.inf)
    nearest = torch.zeros_like(score).masked_fill(filled, torch.inf)
    nearest = nearest.masked_fill(~filled, -torch.inf)
    keep, image = torch.zeros_like(filled), torch.arange(len(lens), device=lens.device)
    for step in range(_steps(count)):
        pick = score.argmax(1)
        keep[image, pick] |= step < count
        nearest = torch.minimum(nearest, distance[image, pick])
        nearest[image, pick] = -torch.inf
        score = nearest
    return keep[filled]


@torch.no_grad()
def determinant_points(
    features: Tensor, lens: Tensor, count: Tensor, quality: Tensor | None = None
) -> Tensor:
    """Greedy maximisation of the determinant of the kernel q_i cos(x_i, x_j) q_j.

    The qualities factor out: each step picks the largest q_i² times the variance of x_i that the
    picks so far leave unexplained, kept up to date by one row of a Cholesky factor. Tokens that are
    fully explained (copies, or more picks than dimensions) go by quality, then by place; so does
    the first pick.

    Args:
        features: (V, W) any float dtype.
        lens: (n,) int64 tokens of each image.
        count: (n,) int64 how many of them.
        quality: (V,) non-negative float; None: all the same.

    Returns:
        (V,) bool. Costs n M² W multiplications for the kernel and n M T² / 2 for all T steps; one
        synchronisation with the device.
    """
    similar, filled = _similarity(features, lens)
    merit = filled.float()
    if quality is not None:
        merit[filled] = quality.float() ** 2
    merit = merit.masked_fill(~filled, -1.0)
    # Exactly one, not one up to rounding, which differs with the shape of the batch. A vector of
    # zeros has nothing to explain.
    rest = similar.diagonal(dim1=1, dim2=2).round()
    steps, image = _steps(count), torch.arange(len(lens), device=lens.device)
    factor = rest.new_zeros(len(lens), steps, rest.shape[1])
    keep = torch.zeros_like(filled)
    for step in range(steps):
        pick = (merit * rest.clamp(min=EXPLAINED)).argmax(1)
        keep[image, pick] |= step < count
        merit[image, pick] = -1.0
        known = factor[:, :step]
        row = similar[image, pick] - (known[image, :, pick][:, None] @ known)[:, 0]
        row = row / rest[image, pick].clamp(min=EXPLAINED).sqrt()[:, None]
        factor[:, step] = row
        rest = rest - row.square()
    return keep[filled]


@torch.no_grad()
def relevance_quality(relevance: Tensor, image: Tensor, images: int) -> Tensor:
    """Relevance stretched to 0..1, plus a millionth of its range for the least relevant token.

    Args:
        relevance: (V,) float.
        image: (V,) ascending ids of the group each range is taken over.
        images: number of groups.

    Returns:
        (V,) float32; 1 throughout a group whose relevance is constant.
    """
    value = relevance.float()
    low = value.new_full((images,), torch.inf).scatter_reduce(0, image, value, "amin")[image]
    high = value.new_full((images,), -torch.inf).scatter_reduce(0, image, value, "amax")[image]
    return torch.where(high > low, (value - low + 1e-6) / (high - low), 1.0)


def _similarity(features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, M, M) float32 cosine similarity within each image, and (n, M) True where a token is."""
    place = torch.arange(len(features), device=features.device)
    index, filled = pad_groups(place, group_ids(lens), len(lens), 0)
    unit = F.normalize(features.float(), dim=-1)
    even = len(unit) == index.numel()  # no pads: the table is the tokens as they stand
    table = unit.view(*index.shape, unit.shape[1]) if even else unit[index]
    return table @ table.transpose(1, 2), filled


def _steps(count: Tensor) -> int:
    return int(count.max()) if len(count) else 0
