"""Attention masks in physical positions.

Legend: B samples, Lq physical queries, Lk physical keys; positions are virtual.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(query: Tensor, key: Tensor, key_filled: Tensor) -> Tensor:
    """The mask of a plain causal model: a key is seen when it stands at or before the query.

    Args:
        query: (B, Lq) absolute virtual positions.
        key: (B, Lk) absolute virtual positions.
        key_filled: (B, Lk) False for alignment pads.

    Returns:
        (B, 1, Lq, Lk) bool, True = seen.
    """
    seen = (key[:, None, :] <= query[:, :, None]) & key_filled[:, None, :]
    return seen[:, None]


def gather_mask(mask: Tensor, query: Tensor, key: Tensor, key_filled: Tensor) -> Tensor:
    """Takes the wanted rows and columns out of the mask the host built in virtual positions.

    This is exact for whatever the host put into it: sliding windows, bidirectional image blocks.

    Args:
        mask: (1 or B, 1, Q, K) bool (True = seen) or float (added to the scores).
        query: (B, Lq) row of each physical query in `mask`.
        key: (B, Lk) column of each physical key in `mask`; negative = outside, unseen.
        key_filled: (B, Lk) False for alignment pads.

    Returns:
        (B, 1, Lq, Lk) of the same kind.
    """
    samples = query.shape[0]
    inside = key_filled & (key >= 0)
    row = torch.arange(samples, device=mask.device)[:, None, None]
    column = key.clamp(min=0)[:, None, :]
    picked = mask.expand(samples, -1, -1, -1)[row, 0, query[:, :, None], column]
    if picked.dtype == torch.bool:
        return (picked & inside[:, None, :])[:, None]
    return picked.masked_fill(~inside[:, None, :], torch.finfo(picked.dtype).min)[:, None]


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = seen) as one that is added to the scores."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def filled_mask(query: Tensor, key_filled: Tensor) -> Tensor:
    """The mask of a model without causality: (B, 1, Lq, Lk), every key that is filled is seen."""
    return key_filled[:, None, None, :].expand(-1, 1, query.shape[1], -1)
