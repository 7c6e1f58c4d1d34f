"""Density-peak clustering of tokens: centres are dense tokens far from any denser one.

The clustering of SeTok (arXiv 2406.05127), batched over padded images. Distances are divided by
sqrt(C), so thresholds do not depend on the width; the density is exp(-mean squared distance to the
k nearest, itself included); the separation is the distance to the nearest denser token. As in the
published code, a token that is not denser stands in with its own largest distance, so the densest
token gets the smallest of these. Score = density x separation.

Ours: densities are compared before the exponential, which underflows for wide features, and of two
equally dense tokens the earlier counts as denser: copies of one token make one centre, not many.
Legend: n images, N tokens of the largest, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-6
"""Size of the published tie-break noise on densities."""


@dataclass(frozen=True)
class Clusters:
    """A clustering of each image's tokens."""

    score: Tensor
    """(n, N) float32: density x separation; 0 at pads."""
    centre: Tensor
    """(n, N) bool."""
    nearest: Tensor
    """(n, N) int64: the centre each token belongs to, as a token of the same image; -1 at pads."""


@torch.no_grad()
def density_peaks(
    features: Tensor,
    filled: Tensor,
    neighbours: int,
    threshold: float,
    fallback: int,
    count: Tensor | None = None,
    seed: int | None = None,
) -> Clusters:
    """Clusters every image's tokens by themselves.

    Args:
        features: (n, N, C) any float dtype.
        filled: (n, N) bool; False at pads.
        neighbours: k; an image of fewer tokens uses them all.
        threshold: tokens of a higher score are centres.
        fallback: number of centres where no score is higher.
        count: (n,) centres of each image, the best-scored; replaces threshold and fallback.
        seed: of the tie-break noise; None: none.

    Returns:
        Every image with tokens has at least one centre, and centres belong to themselves.
    """
    distance = _distances(features.float(), filled)
    log_density = _log_density(distance, filled, neighbours)
    if seed is not None:
        log_density = (log_density.exp() + NOISE * _noise(filled.shape[1], seed, filled)).log()
    separation = _separation(distance, log_density, filled)
    score = (log_density.exp() * separation).masked_fill(~filled, 0.0)
    rank = _rank((log_density + separation.log()).masked_fill(~filled, -torch.inf))
    if count is None:
        above = (score > threshold) & filled
        centre = torch.where(above.any(1, keepdim=True), above, rank < fallback)
    else:
        centre = rank < count[:, None].clamp(min=1)
    centre = centre & filled
    return Clusters(score, centre, _nearest(distance, centre, filled))


def _distances(features: Tensor, filled: Tensor) -> Tensor:
    """(n, N, N), inf where one of the two is a pad.

    Never by matrix products: these are inexact where tokens are close, and on some devices coarse.
    """
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / features.shape[-1] ** 0.5
    return distance.masked_fill(~(filled[:, :, None] & filled[:, None, :]), torch.inf)


def _log_density(distance: Tensor, filled: Tensor, neighbours: int) -> Tensor:
    """(n, N): minus the mean squared distance to the k nearest; -inf at pads."""
    near = distance.topk(min(neighbours, distance.shape[-1]), largest=False).values
    used = near.isfinite()
    square = near.masked_fill(~used, 0.0).square().sum(-1)
    mean = square / used.sum(-1).clamp(min=1)
    return (-mean).masked_fill(~filled, -torch.inf)


def _noise(length: int, seed: int, like: Tensor) -> Tensor:
    """(N,) the same for every image, and a shorter one is its start: a batch equals its rows."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _separation(distance: Tensor, log_density: Tensor, filled: Tensor) -> Tensor:
    """(n, N): how far the next denser token is."""
    token = torch.arange(distance.shape[-1], device=distance.device)
    one, other = log_density[:, :, None], log_density[:, None, :]
    denser = (other > one) | ((other == one) & (token < token[:, None]))
    reach = distance.masked_fill(distance.isinf(), 0.0).amax(1)  # symmetric
    reach = reach.masked_fill(~filled, torch.inf)
    return torch.where(denser, distance, reach[:, None, :]).amin(-1)


def _rank(score: Tensor) -> Tensor:
    """(n, N) place of each token among its image's, 0 = highest; ties go to the earlier token."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)


def _nearest(distance: Tensor, centre: Tensor, filled: Tensor) -> Tensor:
    token = torch.arange(distance.shape[-1], device=distance.device).expand_as(centre)
    nearest = distance.masked_fill(~centre[:, None, :], torch.inf).argmin(-1)
    nearest = torch.where(centre, token, nearest)
    return nearest.masked_fill(~filled, -1)
