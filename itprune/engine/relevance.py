"""Relevance: the attention instruction tokens pay to every token, from one layer's real q and k.

Only the instruction's rows of softmax(q k^T) are computed. Legend: B samples, H heads, L longest
sample, Q most instruction rows of a sample, N tokens alive, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itprune.engine.rows import Rows


@dataclass(frozen=True)
class Tapped:
    """q and k as one layer's attention received them, rotary phase applied."""

    query: Tensor
    """(1, H, N, d) packed or (B, H, L, d)."""
    key: Tensor
    """(1, H_kv, N, d) packed or (B, H_kv, past + L, d)."""
    scale: float
    cos: Tensor
    """(1 or B, …, d_rot) in the same layout as `query`."""
    sin: Tensor


@torch.no_grad()
def instruction_attention(
    tapped: Tapped, rows: Rows, host_layout: bool, asks: Tensor, rope: bool
) -> Tensor:
    """Head-mean attention of each sample's asking rows, averaged over those that see the token.

    Args:
        tapped: one layer's q and k.
        rows: the tokens alive at that layer.
        host_layout: the layer ran on the host's (B, S) rows, padding included.
        asks: (N,) bool, the instruction rows.
        rope: keep the rotary phase in the scores.

    Returns:
        (N,) float32, 0 where no asking row sees the token.
    """
    query, key = tapped.query, tapped.key[..., -tapped.query.shape[-2] :, :]
    if not rope:
        query = unrotate(query, tapped.cos, tapped.sin)
        key = unrotate(key, tapped.cos, tapped.sin)
    if rows.packed and not host_layout:
        query, key = (rows.pad(t[0].transpose(0, 1)).transpose(1, 2) for t in (query, key))
    flat = rows.token if host_layout else rows.slot  # where each token stands in (B, L)
    asking = Rows(flat[asks], rows.samples, query.shape[2], packed=False)
    ask_row, ask_filled = asking.table, asking.filled  # (B, Q)
    samples, heads, _, width = query.shape
    picked = query.gather(2, ask_row[:, None, :, None].expand(-1, heads, -1, width))
    picked = picked.reshape(samples, key.shape[1], -1, picked.shape[2], width)  # grouped queries
    logits = (picked @ key[:, :, None].transpose(-1, -2)).float() * tapped.scale
    logits = logits.flatten(1, 2)  # (B, H, Q, L)
    column = torch.arange(key.shape[2], device=key.device)
    present = torch.zeros(samples * key.shape[2], dtype=torch.bool, device=key.device)
    present = present.index_fill(0, flat, True).view(samples, 1, -1)
    seen = (column <= ask_row[:, :, None]) & present & ask_filled[:, :, None]  # (B, Q, L)
    attention = torch.softmax(logits.masked_fill(~seen[:, None], -1e30), -1).mean(1)
    total = (attention * seen).sum(1)
    watchers = seen.sum(1)
    return (total / watchers.clamp(min=1)).reshape(-1)[flat]


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Takes the rotary phase (rotate-half convention) out of q or k again.

    Args:
        x: (B, H, L, d).
        cos, sin: (1 or B, L, d_rot) with d_rot <= d; a scaling inside them is divided out.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    left, right = turned.chunk(2, dim=-1)
    back = torch.cat([right, -left], dim=-1)
    return torch.cat([(turned * c + back * s) / (c * c + s * s), rest], dim=-1)
