"""Merging visual tokens: every new token is a weighted sum of an image's tokens.

What differs between methods is which tokens and with which weights, made from attention and key
similarity and constant to autograd; the sums are differentiable in the features. All functions
work on tables of n images at once. Legend: P tokens of an image, K new ones, M terms of a sum,
W key width, D feature width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def combine(content: Tensor, weights: Tensor, normalise: bool = False) -> Tensor:
    """New tokens as weighted sums of all tokens.

    Args:
        content: (n, P, D) features.
        weights: (n, K, P) float, not negative.
        normalise: weighted means instead of sums; a row without weights stays zero.

    Returns:
        (n, K, D) in content's dtype, differentiable in `content`.
    """
    return _scaled(weights, normalise).to(content.dtype) @ content


def combine_few(
    content: Tensor, source: Tensor, weights: Tensor, normalise: bool = False
) -> Tensor:
    """New tokens as weighted sums of a few tokens each: only those are read.

    Args:
        content: (n, P, D) features.
        source: (n, K, M) int64: which tokens.
        weights: (n, K, M) float, not negative.
        normalise: weighted means instead of sums.

    Returns:
        (n, K, D) in content's dtype, differentiable in `content`.
    """
    count, tokens, width = content.shape
    start = torch.arange(count, device=content.device)[:, None, None] * tokens
    rows = F.embedding_bag(
        (source + start).flatten(0, 1),
        content.flatten(0, 1),
        per_sample_weights=_scaled(weights, normalise).to(content.dtype).flatten(0, 1),
        mode="sum",
    )
    return rows.view(count, -1, width)


def _scaled(weights: Tensor, normalise: bool) -> Tensor:
    if not normalise:
        return weights
    return weights / weights.sum(2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def take(content: Tensor, ids: Tensor) -> Tensor:
    """(n, P, D) and (n, K) places -> (n, K, D), differentiable in `content`."""
    return content.gather(1, ids[..., None].expand(-1, -1, content.shape[2]))


@torch.no_grad()
def neighbours_of(
    key: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    neighbours: int,
    hidden: Tensor | None = None,
    repeated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        (n, K, M) int64 which tokens a new one sums up, (n, K, M) their weights; its own is first.
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
    own = torch.ones_like(ids, dtype=weight.dtype)
    source = torch.cat([ids[..., None], source], 2)
    return source, torch.cat([own[..., None], given], 2)


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
