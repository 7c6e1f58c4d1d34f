"""Merging visual tokens: every new token is a weighted sum of an image's tokens.

What differs between methods is the table of weights, made from attention and key similarity and
constant to autograd; one product with the features, differentiable in them, makes the new tokens.
All functions work on tables of n images at once. Legend: P tokens of an image, K new ones, W key
width, D feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def combine(weights: Tensor, content: Tensor, normalise: bool = False) -> Tensor:
    """New tokens as weighted sums.

    Args:
        weights: (n, K, P) float, not negative.
        content: (n, P, D) features.
        normalise: weighted means instead of sums; a row without weights stays zero.

    Returns:
        (n, K, D) in content's dtype, differentiable in `content`.
    """
    if normalise:
        total = weights.sum(2, keepdim=True)
        weights = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    return weights.to(content.dtype) @ content


def take(content: Tensor, ids: Tensor) -> Tensor:
    """(n, P, D) and (n, K) places -> (n, K, D), differentiable in `content`."""
    return content.gather(1, ids[..., None].expand(-1, -1, content.shape[2]))


@torch.no_grad()
def neighbour_weights(
    key: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    neighbours: int,
    hidden: Tensor | None = None,
    repeated: Tensor | None = None,
) -> Tensor:
    """Chosen tokens with their nearest others merged in, as PruMerge does (arXiv 2403.15388).

    A new token is the chosen one, weight 1, plus the most similar others with weights of their own.

    Args:
        key: (n, P, W) float, compared by cosine.
        weight: (n, P) float: what a token gives to each new one that takes it in.
        ids: (n, K) int64: the token each new one starts from.
        neighbours: how many others it takes in; fewer where there are fewer.
        hidden: (n, P) bool: tokens that are not taken in. None: all may be.
        repeated: (n, K) bool: new tokens that start where an earlier one does; the shared token
            then stands twice among the candidates. None: all start from different tokens.

    Returns:
        (n, K, P) in weight's dtype.
    """
    length = key.norm(dim=-1).clamp(min=torch.finfo(key.dtype).tiny)
    # The length of a new token's own key does not change which others are nearest.
    cosine = take(key, ids) @ key.transpose(1, 2) / length[:, None]
    near = cosine.scatter(2, ids[..., None], -torch.inf)
    if hidden is not None:
        near = near.masked_fill(hidden[:, None], -torch.inf)
    token = torch.arange(key.shape[1], device=key.device).expand_as(weight)
    if repeated is not None:
        again = cosine.gather(2, ids[:, None].expand(-1, ids.shape[1], -1))
        near = torch.cat([near, again.masked_fill(~repeated[:, None], -torch.inf)], 2)
        token = torch.cat([token, ids], 1)
    best = near.topk(min(neighbours, key.shape[1] - 1), dim=2, sorted=False)
    source = token[:, None].expand_as(near).gather(2, best.indices)
    given = weight[:, None].expand_as(cosine).gather(2, source)
    given = given.masked_fill(best.values == -torch.inf, 0.0)
    own = torch.ones_like(ids, dtype=weight.dtype)[..., None]
    weights = torch.zeros_like(cosine, dtype=weight.dtype).scatter_(2, ids[..., None], own)
    return weights.scatter_add_(2, source, given)


@torch.no_grad()
def target_weights(metric: Tensor, targets: Tensor, include: bool) -> Tensor:
    """Every token that is no target joins its most similar target, as VisionZip does (2412.04467).

    Args:
        metric: (n, P, W) float, compared by cosine.
        targets: (K,) int64: places of the targets.
        include: a new token is the mean of the target and what joins it; off: the target plus the
            mean of what joins it.

    Returns:
        (n, K, P) in metric's dtype.
    """
    unit = F.normalize(metric, dim=-1)
    nearest = (unit @ unit[:, targets].transpose(1, 2)).argmax(2)
    joins = metric.new_zeros(len(metric), len(targets), metric.shape[1])
    joins.scatter_(1, nearest[:, None], 1.0)
    joins[:, :, targets] = 0.0
    size = joins.sum(2, keepdim=True)
    own = F.one_hot(targets, metric.shape[1]).to(metric.dtype)
    return (joins + own) / (size + 1) if include else joins / size.clamp(min=1) + own
